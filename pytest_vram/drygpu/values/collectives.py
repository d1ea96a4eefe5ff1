"""Values of small tensors through NCCL's collectives: the other ranks are taken to hold what this one holds.

Each rank of a dry run is a process of its own that exchanges nothing. DistributedDataParallel and FSDP compare the
number and shapes of parameters across ranks, and programs add up counters: with equal ranks the answer is the right
one.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from pytest_vram.drygpu.values import kernels, known_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SUM = 0  # c10d::ReduceOp::SUM, as its boxed form gives it

SAME_RANKS = "other ranks taken as this one"


class _Called(threading.local):
    is_sum: bool | None = None
    """Whether the reduction that this thread is in adds up; ``None`` where no Python code called it."""


_called = _Called()


def install(library: torch.library.Library) -> None:
    """Register the collectives' kernels in ``library``, a fragment of the namespace ``c10d``."""
    for name, after in _AFTER.items():
        overload = getattr(torch.ops.c10d, name).default
        kernels.put_in_front(library, overload, functools.partial(_kernel, after))
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        for name in ("allreduce", "allreduce_coalesced"):
            setattr(torch.distributed.ProcessGroup, name, _noting(getattr(torch.distributed.ProcessGroup, name)))


def _noting(call: Callable[..., Any]) -> Callable[..., Any]:
    """Note the operation on the way in: before torch 2.10 the object that the kernel is given cannot be read."""

    def noting(group: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        options = next(iter([*args, *kwargs.values()]), torch.distributed.ReduceOp.SUM)
        before = _called.is_sum
        _called.is_sum = getattr(options, "reduceOp", options) == torch.distributed.ReduceOp.SUM
        try:
            return call(group, tensors, *args, **kwargs)
        finally:
            _called.is_sum = before

    return noting


def _is_sum(operation: Any) -> bool | None:
    """Whether a reduction adds up; ``None`` where that cannot be known: C++ code reduces, on torch 2.9 or earlier."""
    if _called.is_sum is None and hasattr(operation, "op"):
        return bool(operation.op() == _SUM)
    return _called.is_sum


def _kernel(after: Callable[..., None], call: Callable[..., Any]) -> Callable[..., Any]:
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
    is_sum = _is_sum(operation)
    if is_sum is False:
        return  # the largest, the smallest and the mean of equal values are that value
    if is_sum is None:
        for tensor in tensors:
            known_values.forget(tensor)
        return
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
