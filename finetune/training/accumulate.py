"""Computes exactly the gradient of the full batch, one micro-batch at a time.

Let S_i be the sum of the token losses of micro-batch i, S the sum of all S_i, and N the number of targets of the whole
window. The backward passes of S_i / N add up to the gradient of S / N. Many trainers take the mean of the
micro-batches' means instead, which gives a token of a short micro-batch more weight than one of a long micro-batch
(transformers#34191).

Only one micro-batch's activations exist at a time, together with the gradients so far. From the second micro-batch on,
a window's peak is larger than that of a single micro-batch by the bytes of the gradients at most. It is not larger at
all if the gradients wait in host memory (:mod:`finetune.training.host_gradients`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from finetune.config.recompute import inputs_on_host
from finetune.kernels.choice import set_kernels
from finetune.model.forward import base_model, computing, hidden_states
from finetune.model.host_inputs import keeping_inputs_on_host
from finetune.model.loss import OWN_LOSS, LogitRule, chunked_cross_entropy, target_positions
from finetune.model.parts import empty_passes, is_sharded
from finetune.model.recompute import set_recompute
from finetune.training import host_gradients, ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.config.settings import TrainConfig
    from finetune.data.batches import Batch

_WIDTHS = 16
"""On a card rows are padded to a multiple of so many tokens, so that no step has to compile kernels for its sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowStats:
    """The figures of one window, over all processes."""

    mean_loss: torch.Tensor
    """Mean cross-entropy of the targets, in nats; 0 if there are no targets. A scalar on the model's device."""
    targets: int
    """Number of tokens that the loss was taken on, N."""
    tokens: int
    """Number of tokens that went through the model, without padding."""
    mean_router_loss: torch.Tensor | None = None
    """Mean over the micro-batches of the router's weighted loss, as a scalar; None if it is off."""

    @property
    def loss(self) -> float:
        """``mean_loss``, for which the host waits until the device has done all its work so far."""
        return float(self.mean_loss)

    @property
    def router_loss(self) -> float | None:
        """``mean_router_loss``, for which the host waits in the same way."""
        return None if self.mean_router_loss is None else float(self.mean_router_loss)


def window_gradients(model: nn.Module, window: Sequence[Batch], config: TrainConfig) -> WindowStats:
    """Add the gradient of the window's mean token loss to ``.grad`` of the trained parameters.

    Under torch.distributed each process computes its own share of the window. The processes sum N before the first
    backward pass, and the gradients after the last one. Over a sharded base, a process with fewer micro-batches than
    another runs empty ones, so that all gather the layers equally often.

    Args:
        model: the model, which is put into training mode. The ``.grad`` of its trained parameters is None or zero.
        window: the micro-batches, on the CPU. The last window of an epoch may be shorter than the others.
        config: has the settings of checkpointing, offloading, the kernels and the loss's chunk.

    Returns:
        The window's figures. A window without targets changes no gradient.
    """
    model.train()
    set_recompute(model, config.checkpointing)
    set_kernels(model, config.kernels)
    device = next(model.parameters()).device
    targets, tokens, shares = _over_processes(
        [sum(b.targets for b in window), sum(b.tokens for b in window), len(window)], device
    )
    if targets == 0:
        return WindowStats(mean_loss=torch.zeros(()), targets=0, tokens=tokens)
    # In fp16, gradients scaled by 1 / N may underflow. So the backward pass computes the gradient of the sum, and the
    # division by N follows.
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
        del loss, total, router  # otherwise this graph would be in memory together with that of the next micro-batch
        if on_host and number < len(passes):
            host_gradients.put_away(parameters, earlier)
    host_gradients.bring_back(earlier)
    router_loss = _sum_over_processes(parameters, loss_sum, router_sum, routed=routed)
    if scaled:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1.0 / targets)
        loss_sum /= targets
    return WindowStats(
        mean_loss=loss_sum,
        targets=targets,
        tokens=tokens,
        mean_router_loss=None if router_loss is None else router_loss / shares,
    )


def micro_batch_loss(
    model: nn.Module, batch: Batch, *, unit: float, config: TrainConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the summed token loss of a micro-batch times ``unit``, and the router's loss, or None if that is off.

    Without a target the loss is a 0 that is connected to all layers, so that the backward pass runs through them too.
    """
    device = next(model.parameters()).device
    base = base_model(model)
    if device.type == "cuda":
        batch = batch.widened(_WIDTHS, getattr(base.config.get_text_config(), "max_position_embeddings", None))
    positions, targets = target_positions(batch.labels)
    moved = batch.to(device)
    on_host = inputs_on_host(config.offload_activations, device.type, sharded=is_sharded(model))
    with keeping_inputs_on_host(model, on_host):
        hidden = hidden_states(model, moved)
    flat = hidden.states.flatten(0, 1)
    if len(positions) < len(flat):
        flat = flat.index_select(0, positions.to(device, non_blocking=True))
    if not len(positions) and not hasattr(base.get_output_embeddings(), OWN_LOSS):  # all ranks gather a sharded head
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
    if not ranks.together():
        return counts
    total = torch.tensor(counts, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return [int(count) for count in total.tolist()]


def _sum_over_processes(
    parameters: Sequence[nn.Parameter], loss_sum: torch.Tensor, router_sum: torch.Tensor | None, *, routed: bool
) -> torch.Tensor | None:
    """Sum gradients and losses over the processes, in place, and return the sum of the router's losses.

    A process whose share gave a parameter no gradient still takes part, because every process must reduce the same
    tensors. A parameter without a gradient in any process keeps None, as in a run of one process, so that the optimizer
    does not update it.
    """
    if not ranks.together():
        return router_sum
    dist.all_reduce(loss_sum)
    if routed:
        router_sum = torch.zeros_like(loss_sum) if router_sum is None else router_sum.to(loss_sum.dtype)
        dist.all_reduce(router_sum)
    parameters = [p for p in parameters if not isinstance(p, DTensor)]  # FSDP sums those of the others
    if not parameters:
        return router_sum
    present = torch.tensor([int(p.grad is not None) for p in parameters], dtype=torch.int32, device=loss_sum.device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    for parameter, anywhere in zip(parameters, present.tolist(), strict=True):
        if not anywhere:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    return router_sum
