"""Micro-batches to exactly the full batch's gradient.

With S_i the sum of token losses of micro-batch i and N the targets of the whole window, the backward passes of S_i /
N add up to the gradient of S / N. The mean of the micro-batches' means, which many trainers take, weighs a token of a
short micro-batch more than one of a long one (transformers#34191).

One micro-batch's activations exist at a time, and beside them the gradients so far: from the second micro-batch on, a
window's peak is larger than that of a single one by the bytes of the gradients at most, and not at all where those wait
in host memory (:mod:`finetune.training.host_gradients`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from finetune.kernels.choice import set_kernels
from finetune.model.forward import base_model, computing, hidden_states, set_checkpointing
from finetune.model.loss import LogitRule, chunked_cross_entropy, target_positions
from finetune.model.parts import empty_passes
from finetune.training import host_gradients

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.config.settings import TrainConfig
    from finetune.data.batches import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowStats:
    """What one window came to, over all processes."""

    loss: float
    """Mean cross-entropy of the targets, in nats; 0 where there is none."""
    targets: int
    """Tokens that the loss was taken on, N."""
    tokens: int
    """Tokens that went through the model, padding left out."""
    router_loss: float | None = None
    """Mean over the micro-batches of the router's weighted loss; None where it is off."""


def window_gradients(model: nn.Module, window: Sequence[Batch], config: TrainConfig) -> WindowStats:
    """Add the gradient of the window's mean token loss to ``.grad`` of the trained parameters.

    Under torch.distributed each process brings its own share of the window: N is summed over the processes before the
    first backward, the gradients after the last. Over a sharded base, a process with fewer micro-batches than another
    runs empty ones, so that all gather the layers equally often.

    Args:
        model: in training mode; its trained parameters' ``.grad`` is None or zero.
        window: micro-batches, on the CPU; the last window of an epoch may be shorter than the others.
        config: for checkpointing, offloading and the loss's chunk.

    Returns:
        The window's figures. A window without a target leaves every gradient as it was.
    """
    model.train()
    set_checkpointing(model, enabled=config.checkpointing)
    set_kernels(model, config.kernels)
    device = next(model.parameters()).device
    targets, tokens, shares = _over_processes(
        [sum(b.targets for b in window), sum(b.tokens for b in window), len(window)], device
    )
    if targets == 0:
        return WindowStats(loss=0.0, targets=0, tokens=tokens)
    # 16-bit floats of fp16's range lose gradients of 1 / N: there the sum's gradient goes backward, and is divided
    # after.
    scaled = _runs_in_fp16(model)
    unit = 1.0 if scaled else 1.0 / targets
    loss_sum = torch.zeros((), device=device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
    router_sum: torch.Tensor | None = None
    routed = bool(getattr(base_model(model).config, "output_router_logits", False))
    parameters = [p for p in model.parameters() if p.requires_grad]
    on_host = host_gradients.wanted(model, config)
    earlier: dict[nn.Parameter, torch.Tensor] = {}
    passes = [*window, *empty_passes(model, len(window))]
    for number, batch in enumerate(passes, start=1):
        loss, router = micro_batch_loss(model, batch, unit=unit, config=config)
        total = loss
        if router is not None and number <= len(window):
            total = loss + router * ((targets if scaled else 1.0) / shares)
            router_sum = router.detach() + (router_sum if router_sum is not None else 0.0)
        if total.requires_grad:
            total.backward()
        loss_sum += loss.detach()
        del loss, total, router  # what their graph still holds would lie beside the next micro-batch's
        if on_host and number < len(passes):
            host_gradients.put_away(parameters, earlier)
    host_gradients.bring_back(earlier)
    router_loss = _sum_over_processes(parameters, loss_sum, router_sum, routed=routed)
    if scaled:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1.0 / targets)
        loss_sum /= targets
    return WindowStats(
        loss=float(loss_sum),
        targets=targets,
        tokens=tokens,
        router_loss=None if router_loss is None else float(router_loss) / shares,
    )


def micro_batch_loss(
    model: nn.Module, batch: Batch, *, unit: float, config: TrainConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The micro-batch's summed token loss times ``unit``, and the router's loss (None where it is off).

    Without a target the loss is a 0 that leads to all layers: backward runs through them all the same.
    """
    positions, targets = target_positions(batch.labels)
    device = next(model.parameters()).device
    moved = batch.to(device)
    hidden = hidden_states(model, moved, offload=config.offload_activations)
    base = base_model(model)
    flat = hidden.states.flatten(0, 1)
    if len(positions) < len(flat):
        flat = flat.index_select(0, positions.to(device, non_blocking=True))
    if not len(positions):
        return flat.sum(dtype=torch.promote_types(flat.dtype, torch.float32)), hidden.router_loss
    with computing(model):
        loss = chunked_cross_entropy(
            flat,
            base.get_output_embeddings(),
            targets.to(device, non_blocking=True),
            unit=unit,
            chunk=config.loss_chunk,
            rule=LogitRule.of(base.config),
        )
    return loss, hidden.router_loss


def _runs_in_fp16(model: nn.Module) -> bool:
    base = base_model(model)
    return bool(base.get_input_embeddings().weight.dtype == torch.float16)


def _over_processes(counts: list[int], device: torch.device) -> list[int]:
    if not (dist.is_available() and dist.is_initialized()):
        return counts
    total = torch.tensor(counts, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return [int(count) for count in total.tolist()]


def _sum_over_processes(
    parameters: Sequence[nn.Parameter], loss_sum: torch.Tensor, router_sum: torch.Tensor | None, *, routed: bool
) -> torch.Tensor | None:
    """Sum gradients and losses over the processes, in place, and return the sum of the router's losses.

    A process whose share gave a parameter no gradient still takes part, because every process must reduce the same
    tensors. A parameter that has a gradient nowhere keeps None, as in one process: an optimizer leaves it alone.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return router_sum
    dist.all_reduce(loss_sum)
    if routed:
        router_sum = torch.zeros_like(loss_sum) if router_sum is None else router_sum.to(loss_sum.dtype)
        dist.all_reduce(router_sum)
    present = torch.tensor([int(p.grad is not None) for p in parameters], dtype=torch.int32, device=loss_sum.device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    for parameter, anywhere in zip(parameters, present.tolist(), strict=True):
        if not anywhere:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    return router_sum
