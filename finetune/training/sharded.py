"""A model whose base or trained weights are spread over ranks: made from a whole one, and put together for disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from finetune.model.full_shard import hand_over, own_parts, parts_of_states, rows_of, shard_all
from finetune.model.load import resolve_device
from finetune.model.parts import is_sharded, part_of
from finetune.training import ranks
from finetune.training.optim import load_optimizer_state, make_optimizer, optimizer_state

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from finetune.config.settings import RunConfig, TrainConfig


def spread(model: nn.Module, config: RunConfig) -> None:
    """Spread a model over the ranks as configured, in place; a second call changes nothing.

    Raises:
        ConfigError: this model cannot be spread.
    """
    if not config.model.shard or is_sharded(model):
        return
    if config.adapter.full:
        shard_all(model, resolve_device(config.model))
    else:
        from finetune.model.shard import shard_base  # needs bitsandbytes

        shard_base(model, on_host=config.model.offload_base)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # NCCL cannot use what the allocator keeps of the weights that were whole


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name; with several ranks they may be parts, see :func:`trained_here`."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_here(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what this rank trains by name: the trained parameters, or its parts of them."""
    parts = own_parts(model)
    return trained(model) if parts is None else parts


def optimizer_of(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Make the optimizer of what this rank trains.

    Raises:
        ConfigError: bitsandbytes is needed and not installed.
    """
    parts = own_parts(model)
    if parts is None:
        return make_optimizer(model.parameters(), config)
    optimizer = make_optimizer(parts.values(), config)
    hand_over(model, optimizer)
    return optimizer


def clip_parts(gradients: Sequence[Tensor], clip: float) -> float:
    """Scale gradients of which ranks have parts, so that their global L2 norm is at most ``clip``; 0 only measures it.

    Args:
        gradients: parts (DTensors), and whole tensors, which are the same in every rank.
        clip: the largest norm.

    Returns:
        The norm before clipping, the same in every rank.
    """
    own = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    squares = torch.zeros(2, device=own[0].device)
    for gradient, part in zip(gradients, own, strict=True):
        squares[int(isinstance(gradient, DTensor))] += torch.linalg.vector_norm(part, dtype=torch.float32).square()
    torch.distributed.all_reduce(squares[1:])
    norm = squares.sum().sqrt()
    if clip > 0:
        torch._foreach_mul_(own, torch.clamp(clip / (norm + 1e-6), max=1.0))
    return float(norm)


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the whole trained weights and optimizer states for a checkpoint. All ranks have to call this.

    Returns:
        ``weights`` by name and ``optimizer`` by the parameter's number. If ranks have parts, rank 0 gets copies in host
        memory, and the other ranks None in place of them.
    """
    parts = own_parts(model)
    if parts is None:
        return {"weights": trained(model), "optimizer": optimizer_state(optimizer)}
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # states in managed memory are read by the host
    parameters = trained(model)
    weights = {name: _whole(parts[name], rows_of(parameter)) for name, parameter in parameters.items()}
    own = {index: optimizer.state.get(part, {}) for index, part in enumerate(parts.values())}
    like = ranks.of_first({index: {key: _kind(value) for key, value in state.items()} for index, state in own.items()})
    states = {
        index: {
            key: _whole(own[index].get(key, part.detach().to(kind or torch.float32)), rows_of(parameter), kind=kind)
            for key, kind in like[index].items()
        }
        for index, (part, parameter) in enumerate(zip(parts.values(), parameters.values(), strict=True))
        if like[index]
    }
    return {"weights": weights, "optimizer": states}


def whole_model(model: nn.Module) -> dict[str, Any] | None:
    """Return the state dict of a model whose trained weights are in parts. All ranks have to call this.

    Returns:
        The whole weights in host memory in rank 0, None in place of each in the others; None if the weights are whole.
    """
    parts = own_parts(model)
    if parts is None:
        return None
    return {
        name: _whole(value.to_local() if isinstance(value, DTensor) else value, rows_of(value))
        for name, value in model.state_dict().items()
    }


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load the weights and states of :func:`whole_state` into the model and the optimizer, or this rank's parts.

    Raises:
        CheckpointError: the state belongs to other parameters.
    """
    here = trained_here(model)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            whole = state["weights"][name]
            here[name].copy_(whole if rows_of(parameter) is None else part_of(whole))
    states = state["optimizer"]
    load_optimizer_state(optimizer, states if own_parts(model) is None else parts_of_states(model, states))


def _kind(value: Any) -> torch.dtype | None:
    """Return the dtype of a state that has the shape of its parameter; None for a number or one that all share."""
    return value.dtype if isinstance(value, torch.Tensor) and value.dim() else None


def _whole(part: Any, rows: int | None, *, kind: torch.dtype | None = torch.float32) -> Any:
    if rows is None or kind is None or not isinstance(part, torch.Tensor):
        return part.detach().cpu() if isinstance(part, torch.Tensor) else part
    return ranks.gathered_rows(part.detach().cpu(), rows)
