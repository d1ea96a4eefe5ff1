"""Takes one optimizer step, or makes one evaluation."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from finetune.disk.run_log import StepStats
from finetune.model.forward import set_checkpointing
from finetune.model.parts import empty_passes
from finetune.training.accumulate import micro_batch_loss, window_gradients
from finetune.training.optim import learning_rate, optimizer_step, set_learning_rate
from finetune.training.sharded import clip_parts

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

    from finetune.config.settings import TrainConfig
    from finetune.data.batches import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalStats:
    """The figures of one evaluation."""

    loss: float
    """Mean cross-entropy over all targets, in nats; nan if there are no targets."""
    targets: int
    """Number of tokens that the loss was taken on."""


def train_step(
    model: nn.Module,
    window: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    *,
    step: int,
    total_steps: int,
) -> StepStats:
    """Compute the gradient of the whole window, clip it once, and update the weights once.

    Args:
        model: the model, with its adapter attached.
        window: the step's micro-batches, on the CPU.
        optimizer: the optimizer of the model's trained parameters.
        config: has the schedule, the clip and what :func:`finetune.training.accumulate.window_gradients` needs.
        step: number of this step, counted from 0.
        total_steps: steps of the whole run.

    Returns:
        The step's figures. A window without targets updates nothing.
    """
    begin = time.perf_counter()
    rate = learning_rate(step, total_steps, config)
    set_learning_rate(optimizer, rate)
    trained = [p for p in model.parameters() if p.requires_grad]
    _drop_gradients(trained)
    stats = window_gradients(model, window, config)
    norm: torch.Tensor | float = 0.0
    if stats.targets:
        norm = clip_gradients([p for p in trained if p.grad is not None], config.clip)
        optimizer_step(optimizer)
        _drop_gradients(trained)
    return StepStats(
        loss=stats.loss,  # the first wait for the device, which had work all the time until here
        targets=stats.targets,
        tokens=stats.tokens,
        grad_norm=float(norm),
        learning_rate=rate,
        seconds=time.perf_counter() - begin,
        router_loss=stats.router_loss,
    )


def _drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def clip_gradients(parameters: Sequence[nn.Parameter], clip: float) -> torch.Tensor | float:
    """Scale the gradients so that their global L2 norm is at most ``clip``. With 0, only measure the norm.

    Returns:
        The norm before clipping, as a scalar on the device of the gradients, or as a number if they are in parts.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        return clip_parts(gradients, clip)
    norm = torch.nn.utils.get_total_norm(gradients)
    if clip > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return norm


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], config: TrainConfig) -> EvalStats:
    """Return the mean token loss over ``batches``, computed without dropout.

    An evaluation needs no more memory than a training step, and draws no random numbers.
    """
    was_training = model.training
    model.eval()
    set_checkpointing(model, enabled=False)
    total, targets = 0.0, 0
    try:
        scored = [batch for batch in batches if batch.targets]
        for batch in (*scored, *empty_passes(model, len(scored))):
            loss, _ = micro_batch_loss(model, batch, unit=1.0, config=config)
            total += float(loss)
            targets += batch.targets
    finally:
        model.train(was_training)
    return EvalStats(loss=total / targets if targets else float("nan"), targets=targets)
