"""AdamW in fp32 over many parameters at once, bf16 weights with exact masters included.

There are two forms. :func:`update_in_torch` is the one to read: a few operators for each parameter. The kernel of
:mod:`finetune.training.adamw_kernel` does the same in one launch for all parameters, where the tensors are, and its
result has the same bits. Both round after every single operation, so neither may use a fused multiply-add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finetune.training.masters import joined, split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Updated:
    """One parameter with all that an update reads and writes; tensors of one shape, on one device, contiguous."""

    weight: Tensor
    """fp32, bf16 or fp16: the parameter's data."""
    gradient: Tensor
    """Of the weight's dtype; only read."""
    first: Tensor
    """fp32 first moment."""
    second: Tensor
    """fp32 second moment."""
    dropped: Tensor | None = None
    """int16: what a bf16 weight drops of its master; None updates the weight itself and rounds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """The numbers of one update; see :meth:`of`."""

    beta1: float
    rest1: float
    """1 - beta1"""
    beta2: float
    rest2: float
    """1 - beta2"""
    eps: float
    """Epsilon times the square root of the second bias correction."""
    rate: float
    """Minus the learning rate, with both bias corrections."""
    shrink: float
    """What decoupled weight decay multiplies a weight by; 1 without decay."""

    @classmethod
    def of(cls, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int) -> Coefficients:
        """The numbers of step ``step``, counted from 1 (https://arxiv.org/abs/1412.6980, end of section 2)."""
        second = (1.0 - betas[1] ** step) ** 0.5
        return cls(
            beta1=betas[0],
            rest1=1.0 - betas[0],
            beta2=betas[1],
            rest2=1.0 - betas[1],
            eps=eps * second,
            rate=-lr * second / (1.0 - betas[0] ** step),
            shrink=1.0 - lr * weight_decay,
        )


@torch.no_grad()
def update(parameters: Sequence[Updated], numbers: Coefficients, *, kernel: bool) -> None:
    """Update all ``parameters`` in place: in one launch for each dtype where ``kernel`` is set, else in torch."""
    if kernel:
        from finetune.training.adamw_kernel import update_in_one_launch

        update_in_one_launch(parameters, numbers)
    else:
        for parameter in parameters:
            update_in_torch(parameter, numbers)


def update_in_torch(of: Updated, numbers: Coefficients) -> None:
    """Update one parameter in place."""
    master = of.weight.float() if of.dropped is None else joined(of.weight, of.dropped)
    gradient = of.gradient.float()
    if numbers.shrink != 1.0:
        master = master * numbers.shrink
    of.first.mul_(numbers.beta1).add_(gradient * numbers.rest1)
    of.second.mul_(numbers.beta2).add_(gradient * numbers.rest2 * gradient)
    change = of.first / _root(of.second).add_(numbers.eps)
    master = master + change.mul_(numbers.rate)
    if of.dropped is None:
        of.weight.copy_(master)
    else:
        split(master, of.weight, of.dropped)


def _root(numbers: Tensor) -> Tensor:
    """The square roots, rounded to nearest: as on a card. PyTorch's own on a CPU are often off by the last bit."""
    return numbers.double().sqrt().float() if numbers.device.type == "cpu" else numbers.sqrt()
