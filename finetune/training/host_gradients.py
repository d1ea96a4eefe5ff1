"""The gradients of earlier micro-batches in host memory, so that a window needs no more of the card than one of them.

A gradient is of use to the next micro-batch only after that one's backward pass, and a window's peak is earlier: while
the layers' inputs are all there. A paged optimizer's user gives up a little bandwidth for memory already; an adapter's
gradients, 80 MiB of a 7B model at rank 16, cross the bus twice for each micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from finetune.config.settings import TrainConfig


def wanted(model: nn.Module, config: TrainConfig) -> bool:
    """Whether earlier gradients go to the host: an adapter's, on a card, under a paged optimizer.

    The gradients of all weights would be gigabytes for each micro-batch.
    """
    device = next(model.parameters()).device
    return device.type != "cpu" and isinstance(model, PeftModel) and config.optimizer.startswith("paged")


def put_away(parameters: Iterable[nn.Parameter], earlier: dict[nn.Parameter, torch.Tensor]) -> None:
    """Add each ``.grad`` to what ``earlier`` holds of its parameter, in host memory, and leave None in its place.

    The sums are the ones that ``.grad`` itself would come to, bit for bit. On CUDA the copies are in order with the
    stream's other work: nothing waits for the card, and the host's bytes are only valid after it was waited for.
    """
    for parameter in parameters:
        if parameter.grad is None:
            continue
        pinned = parameter.grad.device.type == "cuda"
        if parameter in earlier:
            parameter.grad.add_(earlier[parameter].to(parameter.device, non_blocking=True))
        else:
            earlier[parameter] = torch.empty_like(parameter.grad, device="cpu", pin_memory=pinned)
        earlier[parameter].copy_(parameter.grad, non_blocking=pinned)
        parameter.grad = None


def bring_back(earlier: dict[nn.Parameter, torch.Tensor]) -> None:
    """Put the sum of ``earlier`` and ``.grad`` into ``.grad``; ``earlier`` is empty after it."""
    while earlier:
        parameter, kept = earlier.popitem()
        total = kept.to(parameter.device, non_blocking=True)
        if parameter.grad is None:
            parameter.grad = total
        else:
            parameter.grad.add_(total)
