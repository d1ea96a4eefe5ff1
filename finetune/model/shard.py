"""The frozen base spread over ranks: each holds a part of every layer's weights, and a layer is gathered while it runs.

PyTorch's FSDP2 (``fully_shard``) does the work. It shards any parameter along its first dimension, bytes too, so a 4-bit
weight needs no disguise as bf16 (bitsandbytes' ``quant_storage``). What a 4-bit weight is decoded with, its scales, would
stay whole in every rank, because bitsandbytes keeps it beside the parameter: here the scales become parameters as well.

The adapter stays whole in every rank. Its gradients are summed as without sharding, so that optimizers, clipping and
checkpoints are the same.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from bitsandbytes.functional import QuantState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from finetune.model.experts import QuantizedExperts
from finetune.model.forward import base_model, decoder_of
from finetune.model.parts import part_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_SCALES, _SCALES_OF_SCALES = "_scales", "_scales_of_scales"


def shard_base(model: nn.Module) -> None:
    """Leave each rank its part of every layer's frozen weights, in place.

    Embeddings, head and the adapter stay whole.

    Args:
        model: with its adapter, the same in every rank, on this rank's device.
    """
    decoder = decoder_of(base_model(model))
    assert decoder is not None
    for module in list(decoder.modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            _open_linear(module)
        elif isinstance(module, QuantizedExperts):
            _open_experts(module)
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = list(_layers(decoder))
    inside = {id(p) for layer in layers for p in layer.parameters()}
    whole = {p for p in decoder.parameters() if p.requires_grad or id(p) not in inside or p.dim() == 0}
    for layer in layers:
        waiting = _set_aside(layer, whole)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        for (module, name), local in waiting.items():
            shape = getattr(module, name)
            given = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=shape.shape, stride=shape.stride()
            )
            module.register_parameter(name, nn.Parameter(given, requires_grad=False))
    fully_shard(decoder, mesh=mesh, ignored_params=whole)


def _set_aside(layer: nn.Module, whole: set[nn.Parameter]) -> dict[tuple[nn.Module, str], torch.Tensor]:
    """Put parameters of the whole shape, without memory, in the place of a layer's frozen parts; return the parts."""
    found = {}
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in whole:
                continue
            size = getattr(parameter, "whole", None)
            part = parameter.data if size is not None else part_of(parameter.data)
            found[module, name] = part
            empty = torch.empty(parameter.shape if size is None else size, dtype=parameter.dtype, device="meta")
            module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    return found


def _layers(decoder: nn.Module) -> Iterator[nn.Module]:
    """The decoder's layers: the modules that are recomputed as one under checkpointing."""
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) and hasattr(module[0], "gradient_checkpointing"):
            yield from module


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """What is left of a quantization state without its scales."""

    shape: Any
    code: torch.Tensor
    blocksize: int
    quant_type: str
    dtype: torch.dtype
    offset: torch.Tensor | None
    code_of_scales: torch.Tensor | None
    blocksize_of_scales: int

    @classmethod
    def of(cls, state: QuantState) -> _Frame:
        nested = state.state2
        return cls(
            shape=state.shape,
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
            offset=state.offset,
            code_of_scales=None if nested is None else nested.code,
            blocksize_of_scales=0 if nested is None else nested.blocksize,
        )

    def filled(self, scales: torch.Tensor, scales_of_scales: torch.Tensor | None) -> QuantState:
        """Return the state with its scales, which are those of the gathered layer."""
        nested = (
            None
            if scales_of_scales is None
            else QuantState(
                absmax=scales_of_scales,
                code=self.code_of_scales,
                blocksize=self.blocksize_of_scales,
                dtype=torch.float32,
            )
        )
        return QuantState(
            absmax=scales,
            shape=self.shape,
            code=self.code,
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=self.dtype,
            offset=self.offset,
            state2=nested,
        )


class ShardedLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc]
    """A 4-bit layer whose packed weight and scales are parameters of their own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply ``x`` [..., in] by the weight; returns [..., out]."""
        own: Any = self
        state = own.frame.filled(getattr(self, _SCALES), getattr(self, _SCALES_OF_SCALES, None))
        given = x.dtype
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out: torch.Tensor = bnb.matmul_4bit(x, self.weight, bias=bias, quant_state=state).to(given)
        return out


class ShardedExperts(QuantizedExperts):
    """Experts whose packed weights and scales are parameters of their own."""

    def _linear(self, weight: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        own: Any = self
        nested = getattr(self, weight + _SCALES_OF_SCALES, None)
        frame = own.frames[weight][expert]
        state = frame.filled(
            getattr(self, weight + _SCALES)[expert], None if nested is None else nested[expert]
        )
        packed = getattr(self, weight)[expert].view(-1, 1)
        result: torch.Tensor = bnb.matmul_4bit(x, packed.t(), quant_state=state)
        return result + getattr(self, f"{weight}_bias")[expert] if self.has_bias else result


def _frozen(values: torch.Tensor, whole: Any) -> nn.Parameter:
    parameter = nn.Parameter(values, requires_grad=False)
    if whole is not None:
        parameter.whole = whole  # type: ignore[attr-defined]
    return parameter


def _open_linear(layer: Any) -> None:
    state = layer.weight.quant_state
    layer.frame = _Frame.of(state)
    packed, scales, nested = getattr(state, "whole", (None, None, None))
    layer.register_parameter(_SCALES, _frozen(state.absmax, scales))
    if state.state2 is not None:
        layer.register_parameter(_SCALES_OF_SCALES, _frozen(state.state2.absmax, nested))
    layer.weight = _frozen(layer.weight.data, packed)
    layer.quant_state = None
    layer.__class__ = ShardedLinear4bit


def _open_experts(experts: Any) -> None:
    experts.frames = {}
    for weight, states in experts.quant_states.items():
        experts.frames[weight] = [_Frame.of(state) for state in states]
        packed, scales, nested = getattr(states[0], "whole", (None, None, None))
        own = torch.stack([s.absmax for s in states if s.absmax is not None])
        experts.register_parameter(weight + _SCALES, _frozen(own, scales))
        if states[0].state2 is not None:
            own = torch.stack([s.state2.absmax for s in states if s.state2.absmax is not None])
            experts.register_parameter(weight + _SCALES_OF_SCALES, _frozen(own, nested))
        experts.register_parameter(weight, _frozen(getattr(experts, weight).data, packed))
    experts.quant_states = {}
    experts.__class__ = ShardedExperts
