"""Spreads the frozen base over ranks: each holds a part of every layer's weights. A layer is gathered while it runs.

PyTorch's FSDP2 (``fully_shard``) does the work. It shards any parameter along its first dimension, bytes too, so that a
4-bit weight needs no disguise as bf16 (bitsandbytes' ``quant_storage``). bitsandbytes keeps a weight's scales beside
the parameter, where they would stay whole in every rank: here the scales become parameters as well.

The adapter stays whole in every rank. Its gradients are summed as without sharding, so that optimizers, clipping and
checkpoints are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from finetune.errors import ConfigError, Problem
from finetune.model.experts import QuantizedExperts
from finetune.model.forward import base_model, decoder_of
from finetune.model.parts import layers_of, mark_sharded, part_of
from finetune.patches.bitsandbytes import SCALES, SCALES_OF_SCALES, Frame, gather_scales
from finetune.patches.transformers import record_as_before

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from torch.distributed.device_mesh import DeviceMesh

    from finetune.model.parts import Whole

_READ = ("compress_statistics", "quant_type")
"""Attributes of a 4-bit weight that peft reads of a layer that it adapts (``dispatch_bnb_4bit``)."""


def shard_base(model: nn.Module, *, on_host: bool = False) -> None:
    """Leave each rank its part of every layer's frozen weights, in place.

    Embeddings, head and the adapter stay whole.

    Args:
        model: with its adapter, the same in every rank, on this rank's device. Its base was loaded in parts.
        on_host: keep the parts in host memory, where they were loaded. A layer's part is copied to the device whenever
            the layer is gathered.

    Raises:
        ConfigError: the model has quantized weights outside its decoder's layers, or layers that share weights.
    """
    base = base_model(model)
    decoder = decoder_of(base)
    layers = [] if decoder is None else list(layers_of(decoder))
    _require_all_in(layers, base)
    assert decoder is not None
    for layer in layers:
        for module in list(layer.modules()):
            if isinstance(module, bnb.nn.Linear4bit):
                _open_linear(module)
            elif isinstance(module, QuantizedExperts):
                _open_experts(module)
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    inside = {id(p) for layer in layers for p in layer.parameters()}
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if on_host else OffloadPolicy()
    whole = {p for p in decoder.parameters() if p.requires_grad or id(p) not in inside or p.dim() == 0}
    for layer in layers:
        waiting = _set_aside(layer, whole)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole, offload_policy=policy)
        for (module, name), (local, read_by_peft) in waiting.items():
            shape = getattr(module, name)
            given = _on_host(shape, local) if on_host else _on_device(shape, local, mesh)
            parameter = nn.Parameter(given, requires_grad=False)
            parameter.__dict__.update(read_by_peft)
            module.register_parameter(name, parameter)
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    record_as_before(decoder)
    mark_sharded(model)


def _on_device(shape: DTensor, local: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape.shape, stride=shape.stride())


def _on_host(shape: Any, local: torch.Tensor) -> DTensor:
    """Return a part in host memory as FSDP2 expects it. ``DTensor.from_local`` would copy it to the mesh's device."""
    given: Any = torch.empty_like(shape, device="cpu")
    with torch.no_grad():
        given.to_local().set_(local.cpu())
    found: DTensor = given
    return found


def _require_all_in(layers: list[nn.Module], base: nn.Module) -> None:
    """Refuse a model of which a quantized weight would never be gathered, or twice."""
    quantized = [m for m in base.modules() if isinstance(m, bnb.nn.Linear4bit | QuantizedExperts)]
    times = Counter(id(module) for layer in layers for module in layer.modules())
    if quantized and all(times[id(module)] == 1 for module in quantized):
        return
    kind = getattr(base.config, "model_type", type(base).__name__)
    raise ConfigError(
        Problem(
            field="shard",
            value=True,
            why=f"this {kind} model has quantized weights that belong to no layer of its decoder, or to several",
            remedy="use --no-shard, with which every rank has the whole model",
        )
    )


def _set_aside(
    layer: nn.Module, whole: set[nn.Parameter]
) -> dict[tuple[nn.Module, str], tuple[torch.Tensor, dict[str, Any]]]:
    """Put parameters of the whole shape, without memory, in the place of a layer's frozen parts.

    Returns:
        The parts, each with the attributes that peft reads of it when it attaches another adapter.
    """
    found = {}
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in whole:
                continue
            size = getattr(parameter, "whole", None)
            part = parameter.data if size is not None else part_of(parameter.data)
            found[module, name] = part, {key: getattr(parameter, key) for key in _READ if hasattr(parameter, key)}
            empty = torch.empty(parameter.shape if size is None else size, dtype=parameter.dtype, device="meta")
            module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    return found


class _GatheredStates(Sequence["QuantState"]):
    """The quantization states of a layer's experts, each made from the gathered scales when it is asked for."""

    def __init__(self, experts: QuantizedExperts, weight: str, states: Sequence[QuantState]) -> None:
        self._experts, self._weight = experts, weight
        self._frames = [Frame.of(state) for state in states]

    def __len__(self) -> int:
        return len(self._frames)

    @overload
    def __getitem__(self, index: int) -> QuantState: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[QuantState]: ...
    def __getitem__(self, index: int | slice) -> QuantState | Sequence[QuantState]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        nested = getattr(self._experts, self._weight + SCALES_OF_SCALES, None)
        scales = getattr(self._experts, self._weight + SCALES)
        return self._frames[index].filled(scales[index], None if nested is None else nested[index])


def _frozen(values: torch.Tensor, whole: torch.Size | None) -> nn.Parameter:
    parameter = nn.Parameter(values, requires_grad=False)
    if whole is not None:
        parameter.whole = whole  # type: ignore[attr-defined]  # a note of our own on torch's class
    return parameter


def _open_linear(layer: Any) -> None:
    state = layer.weight.quant_state
    whole: Whole = state.whole
    gather_scales(layer)
    layer.register_parameter(SCALES, _frozen(state.absmax, whole.scales))
    if state.state2 is not None:
        nested = _frozen(state.state2.absmax, whole.scales_of_scales)
        layer.register_parameter(SCALES_OF_SCALES, nested)
    weight = layer.weight
    layer.weight = _frozen(weight.data, whole.packed)
    layer.weight.__dict__.update({key: getattr(weight, key) for key in _READ})


def _open_experts(experts: Any) -> None:
    for weight, states in list(experts.quant_states.items()):
        whole: Whole = states[0].whole
        experts.quant_states[weight] = _GatheredStates(experts, weight, states)
        own = torch.stack([state.absmax for state in states if state.absmax is not None])
        experts.register_parameter(weight + SCALES, _frozen(own, whole.scales))
        if states[0].state2 is not None:
            own = torch.stack([state.state2.absmax for state in states if state.state2.absmax is not None])
            experts.register_parameter(weight + SCALES_OF_SCALES, _frozen(own, whole.scales_of_scales))
        experts.register_parameter(weight, _frozen(getattr(experts, weight).data, whole.packed))
