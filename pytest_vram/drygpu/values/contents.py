"""Reads and writes the values of small tensors that ranks exchange, and combines them by a reduction."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

import torch

from pytest_vram.drygpu.values import known_values
from pytest_vram.drygpu.values.exchange import UNKNOWN, Value
from pytest_vram.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WHOLE_NUMBERS_LIMIT = 4 * MIB
"""The largest tensor of whole numbers that is exchanged, in bytes; larger ones hold weights or tokens, not sizes."""


def is_carried(tensor: torch.Tensor) -> bool:
    """Return whether a piece of this type and size is exchanged."""
    if not known_values.is_carried(tensor):
        return False
    return (
        tensor.dtype not in known_values.WHOLE_NUMBERS or tensor.numel() * tensor.element_size() <= WHOLE_NUMBERS_LIMIT
    )


def read(tensor: torch.Tensor) -> Value:
    """Return the value of a tensor as far as this rank knows it."""
    if not is_carried(tensor):
        return UNKNOWN
    known, guess = known_values.vouch((tensor,))
    if not known:
        return UNKNOWN
    plain = known_values.on_cpu(tensor.detach()).contiguous()
    return Value(data=ctypes.string_at(plain.data_ptr(), plain.numel() * plain.element_size()), guess=guess)


def write(tensor: torch.Tensor, value: Value) -> None:
    """Write a value to the tensor in which the collective leaves it."""
    if (
        value.data is None
        or not is_carried(tensor)
        or not known_values.can_learn(tensor)
        or len(value.data) != tensor.numel() * tensor.element_size()
    ):
        known_values.forget(tensor)
        return
    if tensor.numel():
        known_values.on_cpu(tensor.detach()).copy_(_plain(value.data, tensor.dtype).view(tensor.shape))
        known_values.learn(tensor, value.guess)


def _plain(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)


def reduced(values: Sequence[Value], dtype: torch.dtype, name: str | None) -> Value:
    """Return the reduction of all ranks' values; it is unknown if a value or the reduction is unknown.

    Args:
        values: one value for each rank.
        dtype: the tensor's type.
        name: the name of the reduction, one of ``OPERATIONS``; None if the reduction is unknown.
    """
    if name is None or any(value.data is None for value in values):
        return UNKNOWN
    if not values[0].data:
        return values[0]
    wide = _WIDER.get(dtype, dtype)
    parts = torch.stack([_plain(value.data or b"", dtype).to(wide) for value in values])
    result = _REDUCE[name](parts).to(dtype).contiguous()
    data = ctypes.string_at(result.data_ptr(), result.numel() * result.element_size())
    return Value(data=data, guess=next((value.guess for value in values if value.guess), ""))


def _mean(parts: torch.Tensor) -> torch.Tensor:
    total = parts.sum(0, dtype=parts.dtype)
    return total / len(parts) if parts.is_floating_point() else torch.div(total, len(parts), rounding_mode="trunc")


# The numbers of c10d::ReduceOp in its boxed form. A premultiplied sum is missing, because the stub never sees its
# factor.
OPERATIONS = {0: "sum", 1: "avg", 2: "product", 3: "min", 4: "max", 5: "band", 6: "bor", 7: "bxor"}
_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.bool: torch.int32}
_REDUCE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda parts: parts.sum(0, dtype=parts.dtype),
    "avg": _mean,
    "product": lambda parts: parts.prod(0, dtype=parts.dtype),
    "min": lambda parts: parts.amin(0),
    "max": lambda parts: parts.amax(0),
    "band": lambda parts: functools.reduce(torch.bitwise_and, parts),
    "bor": lambda parts: functools.reduce(torch.bitwise_or, parts),
    "bxor": lambda parts: functools.reduce(torch.bitwise_xor, parts),
}
