"""Runs the operators of PyTorch's own database on the CPU and on the dry GPU: `every_operator.py PART PARTS`.

Every operator must run there, forward and backward, and results that count as known must be those of the CPU.
"""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.testing._internal.common_methods_invocations import op_db

from pytest_vram.drygpu.values import known_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SAMPLES = 4
DTYPES = (torch.float32, torch.int64, torch.bool)
NOT_ON_A_CARD = {
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "has no CUDA kernel",
    "as_strided": "its samples are views of a storage, which `.to` does not keep",
    "narrow_copy": "its form with `out` has no CUDA kernel",
    "sparse.mm": "the reductions among its samples have no CUDA kernel",
    "tensor_split": "takes its indices from the CPU",
}


def on(value: Any, device: str) -> Any:
    """Return the same value with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if type(value) in (list, tuple):
        return type(value)(on(item, device) for item in value)
    if isinstance(value, dict):
        return {key: on(item, device) for key, item in value.items()}
    return torch.device(device) if isinstance(value, torch.device) else device if value == "cpu" else value


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def ways(op: Any, sample: Any) -> dict[str, Callable[[str], Any]]:
    """Return the ways to call an operator with a sample, each with a device as its argument."""

    def plain(device: str) -> Any:
        result = op(on(sample.input, device), *on(sample.args, device), **on(sample.kwargs, device))
        learning = [t.abs().sum() for t in tensors(result) if t.requires_grad and t.layout == torch.strided]
        if learning and op.supports_autograd:
            torch.stack(learning).sum().backward()
        return result

    def in_place(device: str) -> Any:
        own = on(sample.input, device).detach().clone()
        op.inplace_variant(own, *on(sample.args, device), **on(sample.kwargs, device))
        return own

    return {"": plain, "in place": in_place} if op.inplace_variant else {"": plain}


def compare(op: Any, dtype: torch.dtype) -> Iterator[str]:
    """Yield what fails on the dry GPU and not on the CPU, and what differs though it counts as known."""
    samples = list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=dtype.is_floating_point), 40))
    chosen = samples[:: max(1, len(samples) // SAMPLES)]
    for sample, name in itertools.product(chosen, ("", "in place")):
        way = ways(op, sample).get(name)
        try:
            wanted = list(tensors(way("cpu"))) if way else []
        except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
            continue  # the CPU does not take the sample either
        try:
            got = list(tensors(way("cuda"))) if way else []
        except Exception as error:
            yield f"{op.name} {name} {dtype}: {type(error).__name__}: {error}"
            continue
        for one, other in zip(wanted, got, strict=False):
            if other.layout != torch.strided or other.device.type != "cuda" or other.is_complex():
                continue
            entry = known_values.find(other.detach())
            if entry is None or entry.guess or one.device.type != "cpu":
                continue
            kept = known_values.on_cpu(other.detach())
            if one.shape == kept.shape and not torch.allclose(one.double(), kept.double(), 1e-3, 1e-5, equal_nan=True):
                yield f"{op.name} {name} {dtype}: known as {kept.flatten()[:4].tolist()}, {one.flatten()[:4].tolist()}"


def main(part: int, parts: int) -> None:
    warnings.simplefilter("ignore")
    wrong: list[str] = []
    run = 0
    for op in op_db[part::parts]:
        for dtype in DTYPES:
            if op.name not in NOT_ON_A_CARD and dtype in op.dtypesIfCUDA and dtype in op.dtypes:
                run += 1
                wrong += compare(op, dtype)
    print(json.dumps({"run": run, "wrong": wrong}))


main(int(sys.argv[1]), int(sys.argv[2]))
