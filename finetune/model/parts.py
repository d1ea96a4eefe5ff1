"""This rank's part of a quantized weight, kept while a base is loaded: no card ever has to hold the whole of it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterator

_wanted = False


def wanted() -> bool:
    """Whether a base is being loaded in parts."""
    return _wanted


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keep this rank's part of every weight that is quantized inside the block."""
    global _wanted
    _wanted = True
    try:
        yield
    finally:
        _wanted = False


def part_of(values: torch.Tensor) -> torch.Tensor:
    """Return a copy of this rank's part of ``values``, as FSDP2 cuts it along the first dimension."""
    chunks = torch.chunk(values, dist.get_world_size(), dim=0)
    rank = dist.get_rank()
    return chunks[rank].clone() if rank < len(chunks) else values[:0].clone()


def keep_of_linear(weight: Any) -> None:
    """Keep this rank's part of a quantized weight and its scales, and remember their whole shapes."""
    state = weight.quant_state
    state.whole = (weight.shape, state.absmax.shape, None if state.state2 is None else state.state2.absmax.shape)
    weight.data = part_of(weight.data)
    state.absmax = part_of(state.absmax)
    if state.state2 is not None:
        state.state2.absmax = part_of(state.state2.absmax)


def keep_of_experts(packed: torch.Tensor, states: list[Any]) -> torch.Tensor:
    """Keep this rank's experts, and remember the whole shapes."""
    count = len(states)
    rows = torch.chunk(torch.arange(count), dist.get_world_size())
    own = rows[dist.get_rank()].tolist() if dist.get_rank() < len(rows) else []
    for number, state in enumerate(states):
        nested = state.state2
        state.whole = (
            packed.shape,
            torch.Size((count, *state.absmax.shape)),
            None if nested is None else torch.Size((count, *nested.absmax.shape)),
        )
        if number not in own:
            state.absmax = None
            if nested is not None:
                nested.absmax = None
    return part_of(packed)
