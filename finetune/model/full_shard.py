"""Spreads all weights over ranks to train them: each has a part of every weight, its gradient and its optimizer state.

PyTorch's FSDP2 (``fully_shard``) gathers a layer while it runs, and gives each rank its part of the summed gradient.
The token table and the head are gathered on their own. Tables that both share, and weights outside of the decoder,
stay whole in every rank.

The optimizer updates this rank's parts, which are ordinary tensors to it. AdamW treats every element alike, so that the
parts together are what one process would have. Checkpoints hold whole weights and states, which rank 0 puts together.
"""

from __future__ import annotations

import types
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from finetune.errors import ConfigError, Problem
from finetune.model.forward import base_model, decoder_of
from finetune.model.loss import OWN_LOSS, linear_cross_entropy
from finetune.model.parts import layers_of, mark_sharded, part_of
from finetune.patches.transformers import record_as_before

if TYPE_CHECKING:
    from collections.abc import Mapping

_PARTS = "finetune_own_parts"
_NEEDED = "set_force_sum_reduction_for_comms"


def shard_all(model: nn.Module, device: torch.device) -> None:
    """Leave each rank its part of the weights of the decoder and the head, in place and on ``device``.

    Args:
        model: the model, whose weights are the same in every rank. They may be on the CPU: one layer at a time is whole
            on the device.
        device: this rank's device.

    Raises:
        ConfigError: the model has no decoder whose layers can be told apart, layers share weights, or this version of
            torch cannot sum gradients.
    """
    base = base_model(model)
    decoder = decoder_of(base)
    layers = [] if decoder is None else list(layers_of(decoder))
    _require_own_weights(layers, base)
    assert decoder is not None
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    tables = _tables(base, decoder)
    ours = {id(p) for module in (decoder, *tables) for p in module.parameters()}
    shared = _shared(base)
    whole = {p for p in base.parameters() if id(p) not in ours or id(p) in shared or p.dim() == 0}
    # The decoder comes last. By default it would keep its own weights whole after its forward pass; here it gives them
    # up too, so that between two passes each rank has only its part of every weight.
    for module in (*layers, *tables, decoder):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    record_as_before(decoder)
    head: Any = base.get_output_embeddings()
    if isinstance(head, FSDPModule):
        setattr(head, OWN_LOSS, types.MethodType(linear_cross_entropy, head))
        register_fsdp_forward_method(base.get_output_embeddings(), OWN_LOSS)
    for tensor in (*whole, *base.buffers()):
        tensor.data = tensor.data.to(device)
    for module in base.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    mark_sharded(model)
    parts = {name: _own(parameter) for name, parameter in base.named_parameters() if parameter.requires_grad}
    object.__setattr__(base, _PARTS, parts)  # as an attribute of the module they would be parameters of the model


def _require_own_weights(layers: list[nn.Module], base: nn.Module) -> None:
    times = Counter(id(parameter) for layer in layers for parameter in layer.parameters())
    kind = getattr(base.config, "model_type", type(base).__name__)
    why = None
    if not hasattr(FSDPModule, _NEEDED):
        why = f"torch {torch.__version__} cannot add up the gradients of sharded weights, only average them"
    elif not layers:
        why = f"this {kind} model has no decoder whose layers could be gathered one at a time"
    elif any(count > 1 for count in times.values()):
        why = f"layers of this {kind} model share their weights"
    if why is not None:
        remedy = "use --no-shard, with which every rank has the whole model, or train an adapter with --no-full"
        raise ConfigError(Problem(field="shard", value=True, why=why, remedy=remedy))


def _tables(base: Any, decoder: nn.Module) -> list[nn.Module]:
    """Return the token table and the head, if each has weights of its own and a forward of its own to gather them."""
    inputs, head = base.get_input_embeddings(), base.get_output_embeddings()
    shared = _shared(base)
    inside = any(module is inputs for module in decoder.modules())
    found: list[nn.Module] = []
    if inside and type(inputs) is nn.Embedding and not any(id(p) in shared for p in inputs.parameters()):
        found.append(inputs)
    if type(head) is nn.Linear and not any(id(p) in shared for p in head.parameters()):
        found.append(head)
    return found


def _shared(base: nn.Module) -> set[int]:
    """Return the ``id`` of each parameter that several modules have, so that no one module could gather it for all."""
    times = Counter(id(p) for module in base.modules() for p in module.parameters(recurse=False))
    return {number for number, count in times.items() if count > 1}


def _own(parameter: nn.Parameter) -> nn.Parameter:
    """Return this rank's part of a parameter, in the same memory; the parameter itself if it is whole."""
    if not isinstance(parameter, DTensor):
        return parameter
    part: Any = parameter.detach()
    return nn.Parameter(part.to_local(), requires_grad=True)


def own_parts(model: nn.Module) -> dict[str, nn.Parameter] | None:
    """Return what this rank trains, by the parameter's name; None if the model's trained weights are whole."""
    found: dict[str, nn.Parameter] | None = getattr(base_model(model), _PARTS, None)
    return found


def hand_over(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make every step of an optimizer over :func:`own_parts` take the gradients that FSDP has left.

    Both the gradients of the weights and those of the parts are None after the step.
    """
    parts = own_parts(model)
    assert parts is not None
    pairs = [(parameter, parts[name]) for name, parameter in base_model(model).named_parameters() if name in parts]
    apart = [(whole, part) for whole, part in pairs if whole is not part]

    def take(*_: object) -> None:
        for whole, part in apart:
            gradient, whole.grad = whole.grad, None
            if isinstance(gradient, DTensor) and part.numel():
                part.grad = gradient.to_local()

    def drop(*_: object) -> None:
        for _whole, part in apart:
            part.grad = None

    optimizer.register_step_pre_hook(take)
    optimizer.register_step_post_hook(drop)


def rows_of(parameter: torch.Tensor) -> int | None:
    """Return the length of a weight's first dimension, along which ranks have parts of it; None if it is whole."""
    return int(parameter.shape[0]) if isinstance(parameter, DTensor) else None


def parts_of_states(model: nn.Module, states: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return this rank's part of whole optimizer states. The keys are the numbers of the trained parameters.

    A rank that has no part of a parameter has no state of it.
    """
    parameters = [p for p in base_model(model).parameters() if p.requires_grad]
    found: dict[int, dict[str, Any]] = {}
    for index, state in states.items():
        parameter = parameters[index]
        if rows_of(parameter) is None:
            found[index] = dict(state)
        elif _own(parameter).numel():
            found[index] = {name: _part(value, parameter) for name, value in state.items()}
    return found


def _part(value: Any, of: torch.Tensor) -> Any:
    return part_of(value) if isinstance(value, torch.Tensor) and value.shape == of.shape else value
