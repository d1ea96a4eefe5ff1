"""Finds which reduction a collective performs: before torch 2.10, its kernel gets an object that cannot be read."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from pytest_vram.drygpu.values.contents import OPERATIONS

if TYPE_CHECKING:
    from collections.abc import Callable

_NAMES_ITS_KIND = (2, 10)
"""The first version of torch whose boxed ``ReduceOp`` says which reduction it is."""
_REDUCTIONS = (
    "allreduce",
    "allreduce_coalesced",
    "reduce",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
)


class _Called(threading.local):
    operation: Any = None
    """The reduction that Python code called in this thread; None if no Python code did."""


_called = _Called()


def install() -> None:
    """Patch the collectives to note the reduction that Python code passes, if the installed torch needs it."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _NAMES_ITS_KIND:
        for name in _REDUCTIONS:
            setattr(torch.distributed.ProcessGroup, name, _noting(getattr(torch.distributed.ProcessGroup, name)))


def _noting(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call`` wrapped so that it notes the reduction, which the kernel cannot read before torch 2.10."""

    def noting(group: Any, *args: Any, **kwargs: Any) -> Any:
        before = _called.operation
        given = (getattr(value, "reduceOp", value) for value in [*args, *kwargs.values()])
        reductions = (value for value in given if isinstance(value, (torch.distributed.ReduceOp, _KIND)))
        _called.operation = next(reductions, torch.distributed.ReduceOp.SUM)
        try:
            return call(group, *args, **kwargs)
        finally:
            _called.operation = before

    return noting


_KIND = type(torch.distributed.ReduceOp.SUM)


def name_of(operation: Any) -> str | None:
    """Return the name of a reduction, or None if it is unknown.

    On torch 2.9 or earlier, a reduction that C++ code calls is unknown.
    """
    if hasattr(operation, "op"):
        return OPERATIONS.get(operation.op())
    for name in OPERATIONS.values():
        if _called.operation == getattr(torch.distributed.ReduceOp, name.upper()):
            return name
    return None
