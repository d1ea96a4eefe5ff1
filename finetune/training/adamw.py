"""Updates many parameters at once with AdamW in fp32, including bf16 weights with exact masters.

There are two implementations, whose results are equal bit for bit. :func:`update_in_torch` is the one to read: it runs
a few operators for each parameter. The kernel of :mod:`finetune.training.adamw_kernel` updates all parameters of a
device in one launch. Both round after every single operation, so neither may use a fused multiply-add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.training.masters import joined, split

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Updated:
    """The tensors of one parameter that an update reads and writes, contiguous, of one shape and on one device."""

    weight: Tensor
    """The parameter's data, in fp32, bf16 or fp16."""
    gradient: Tensor
    """The gradient, in the weight's dtype. It is only read."""
    first: Tensor
    """The first moment, in fp32."""
    second: Tensor
    """The second moment, in fp32."""
    dropped: Tensor | None = None
    """The bits of its master that a bf16 weight drops, in int16. If None, the weight itself is updated and rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """The coefficients of one update, as :meth:`of` computes them."""

    beta1: float
    rest1: float
    """1 - beta1"""
    beta2: float
    rest2: float
    """1 - beta2"""
    eps: float
    """Epsilon times the square root of the second bias correction."""
    rate: float
    """The negative learning rate, with both bias corrections."""
    shrink: float
    """The factor by which decoupled weight decay multiplies a weight; 1 without decay."""

    @classmethod
    def of(cls, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int) -> Coefficients:
        """Compute the coefficients of a step, counted from 1 (https://arxiv.org/abs/1412.6980, end of section 2)."""
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
    """Return the square roots rounded to nearest, as a card does. PyTorch's on a CPU are often off by the last bit."""
    return numbers.double().sqrt().float() if numbers.device.type == "cpu" else numbers.sqrt()
