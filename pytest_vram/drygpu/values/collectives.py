"""Values of small tensors through NCCL's collectives: the other ranks are taken to hold what this one holds.

Each rank of a dry run is a process of its own that exchanges nothing. DistributedDataParallel and FSDP compare the
number and shapes of parameters across ranks, and programs add up counters: with equal ranks the answer is the right
one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from pytest_vram.drygpu.values import known_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SUM = 0  # c10d::ReduceOp::SUM, as its boxed form gives it

SAME_RANKS = "other ranks taken as this one"


def install(library: torch.library.Library) -> None:
    """Register the collectives' kernels in ``library``, a fragment of the namespace ``c10d``."""
    for name, after in _AFTER.items():
        call = torch.library.get_kernel(f"c10d::{name}", "CUDA").call_boxed
        library.impl(name, _kernel(call, after), "CUDA", with_keyset=True, allow_override=True)


def _kernel(call: Callable[..., Any], after: Callable[..., None]) -> Callable[..., Any]:
    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        result = call(keyset, *args, **kwargs)
        if "nccl" in str(torch.distributed.get_backend_config()):
            after(*args)
        return result

    return kernel


def _all_gather(outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], *_rest: Any) -> None:
    for gathered, own in zip(outputs, inputs, strict=True):
        for part in gathered:
            _give(part, own)


def _all_gather_base(output: torch.Tensor, own: torch.Tensor, *_rest: Any) -> None:
    for part in output.view(-1).split(max(own.numel(), 1)):
        _give(part, own.reshape(-1))


def _all_gather_coalesced(outputs: list[torch.Tensor], inputs: list[torch.Tensor], *_rest: Any) -> None:
    for output, own in zip(outputs, inputs, strict=True):
        _all_gather_base(output, own)


def _all_reduce(tensors: list[torch.Tensor], group: Any, operation: Any, *_rest: Any) -> None:
    if operation.op() != _SUM:
        return  # the largest, the smallest and the mean of equal values are that value
    ranks = torch.distributed.ProcessGroup.unbox(group).size()
    for tensor in _known(tensors):
        known_values.on_cpu(tensor).mul_(ranks)
        known_values.learn(tensor, SAME_RANKS)


def _known(tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    return (tensor for tensor in tensors if known_values.is_carried(tensor) and known_values.vouch((tensor,))[0])


def _give(part: torch.Tensor, own: torch.Tensor) -> None:
    known, guess = known_values.vouch((own,))
    if known and known_values.is_carried(part) and part.numel() == own.numel():
        known_values.on_cpu(part).copy_(known_values.on_cpu(own).view(part.shape))
        known_values.learn(part, guess or SAME_RANKS)
    else:
        known_values.forget(part)


_AFTER: dict[str, Callable[..., None]] = {
    "allgather_": _all_gather,
    "_allgather_base_": _all_gather_base,
    "allgather_into_tensor_coalesced_": _all_gather_coalesced,
    "allreduce_": _all_reduce,
    "allreduce_coalesced_": _all_reduce,
}
