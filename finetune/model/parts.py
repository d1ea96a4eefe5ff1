"""Keeps this rank's part of each quantized weight while a base is loaded, so that no card holds the whole base."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from finetune.data.batches import Batch
from finetune.data.encode import IGNORED
from finetune.disk.resume import SAMPLE
from finetune.model.forward import base_model
from finetune.model.host_parts import HostParts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_wanted = False
_host: HostParts | None = None
_SHARDED = "finetune_sharded"
_WITHOUT_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """What a rank remembers of a whole weight when it keeps a part of it."""

    packed: torch.Size
    """Shape of the packed weight."""
    scales: torch.Size
    """Shape of its scales."""
    scales_of_scales: torch.Size | None
    """Shape of the scales that the scales are quantized with; None without double quantization."""
    first: torch.Tensor
    """Its first elements, [1024] at most, on the CPU, from which the fingerprint of the base is computed."""


def wanted() -> bool:
    """Whether a base is being loaded in parts."""
    return _wanted


@contextlib.contextmanager
def kept(*, wanted: bool = True, on_host: bool = False) -> Iterator[None]:
    """Keep this rank's part of every weight that is quantized inside the block. Without ``wanted``, do nothing.

    With ``on_host`` the parts are in host memory, which is pinned if there is a card. Weights are read one after
    another: transformers' threads would put several whole ones on the card at a time.

    Raises:
        ConfigError: the host has no room for a part.
    """
    global _wanted, _host
    if not wanted:
        yield
        return
    before = os.environ.get(_WITHOUT_THREADS)
    os.environ[_WITHOUT_THREADS] = "1"
    _wanted = True
    _host = host = HostParts(pinned=torch.cuda.is_available()) if on_host else None
    try:
        yield
    finally:
        _wanted, _host = False, None
        if before is None:
            del os.environ[_WITHOUT_THREADS]
        else:
            os.environ[_WITHOUT_THREADS] = before
        if host is not None and host.refused is not None:
            raise host.refused  # transformers goes on after an error and reports all of them at the end, without remedy


def part_of(values: torch.Tensor) -> torch.Tensor:
    """Return a copy of this rank's part of ``values``, as FSDP2 cuts it along the first dimension."""
    chunks = torch.chunk(values, dist.get_world_size(), dim=0)
    rank = dist.get_rank()
    part = chunks[rank] if rank < len(chunks) else values[:0]
    return part.clone() if _host is None else _host.copy(part)


def keep_of_linear(weight: Any) -> None:
    """Keep this rank's part of a quantized weight and its scales, and remember the whole as ``quant_state.whole``."""
    state = weight.quant_state
    state.whole = Whole(
        packed=weight.shape,
        scales=state.absmax.shape,
        scales_of_scales=None if state.state2 is None else state.state2.absmax.shape,
        first=_first(weight.data),
    )
    weight.data = part_of(weight.data)
    state.absmax = part_of(state.absmax)
    if state.state2 is not None:
        state.state2.absmax = part_of(state.state2.absmax)


def keep_of_experts(packed: torch.Tensor, states: Sequence[Any]) -> torch.Tensor:
    """Return this rank's experts, and drop the other experts' scales.

    Args:
        packed: [experts, bytes].
        states: the quantization state of each expert. Each gets ``whole``, and loses its scales if it is another
            rank's.
    """
    rows = torch.chunk(torch.arange(len(states)), dist.get_world_size())
    own = rows[dist.get_rank()].tolist() if dist.get_rank() < len(rows) else []
    first = _first(packed)
    for number, state in enumerate(states):
        nested = state.state2
        state.whole = Whole(
            packed=packed.shape,
            scales=torch.Size((len(states), *state.absmax.shape)),
            scales_of_scales=None if nested is None else torch.Size((len(states), *nested.absmax.shape)),
            first=first,
        )
        if number not in own:
            state.absmax = None
            if nested is not None:
                nested.absmax = None
    return part_of(packed)


def wholes(model: nn.Module) -> dict[str, Whole]:
    """Return what is remembered of the weights that were loaded in parts, by the parameter's name."""
    found: dict[str, Whole] = {}
    for path, module in model.named_modules():
        states = {name: states[0] for name, states in getattr(module, "quant_states", {}).items()}
        states["weight"] = getattr(getattr(module, "weight", None), "quant_state", None)
        for name, state in states.items():
            whole = getattr(state, "whole", None)
            if whole is not None:
                found[f"{path}.{name}"] = whole
    return found


def mark_sharded(model: nn.Module) -> None:
    """Note on a model that its ranks gather its layers together."""
    setattr(base_model(model), _SHARDED, True)


def is_sharded(model: nn.Module) -> bool:
    """Whether the ranks gather this model's layers together, so that all must run the same number of passes."""
    return bool(getattr(base_model(model), _SHARDED, False))


def empty_passes(model: nn.Module, count: int) -> list[Batch]:
    """Return batches without a target, so that this rank makes as many passes as the busiest rank.

    Args:
        model: if it is not sharded, ranks may make different numbers of passes, and the list is empty.
        count: passes that this rank has of its own.
    """
    if not is_sharded(model):
        return []
    most = torch.tensor(count, device=next(model.parameters()).device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    return [Batch(input_ids=ids, labels=torch.full_like(ids, IGNORED))] * (int(most) - count)


def layers_of(decoder: nn.Module) -> Iterator[nn.Module]:
    """Yield the decoder's layers: the modules that are recomputed as one under checkpointing."""
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) and hasattr(module[0], "gradient_checkpointing"):
            yield from module


def _first(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1)[:SAMPLE].cpu().clone()
