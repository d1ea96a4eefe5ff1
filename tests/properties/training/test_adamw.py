"""The readable form of the update on a card against AdamW's formulas in fp64, and with masters against itself in fp32.

Source of the formulas: https://arxiv.org/abs/1711.05101 (AdamW), algorithm 2.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune.training.adamw import Coefficients, Updated, update_in_torch
from finetune.training.masters import joined, split

COUNT = 300
BETAS = (0.9, 0.99)
FEW = settings(max_examples=settings.default.max_examples // 5)
DRAWN = given(
    seed=st.integers(0, 2**16),
    exponent=st.floats(-4, 1),
    rate=st.floats(1e-5, 1e-1),
    decay=st.sampled_from([0.0, 0.1]),
    eps=st.sampled_from([1e-8, 1e-2]),
    steps=st.integers(1, 5),
)


def gradients(seed: int, exponent: float, steps: int) -> list[Tensor]:
    """Gradients that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(COUNT, generator=generator) * 10**exponent).bfloat16().float() for _ in range(steps)]


def updated(weight: Tensor, found: list[Tensor], rate: float, decay: float, eps: float, dropped: Tensor | None) -> None:
    first, second = torch.zeros(COUNT), torch.zeros(COUNT)
    for step, gradient in enumerate(found, start=1):
        numbers = Coefficients.of(lr=rate, betas=BETAS, eps=eps, weight_decay=decay, step=step)
        of = Updated(weight=weight, gradient=gradient.to(weight.dtype), first=first, second=second, dropped=dropped)
        update_in_torch(of, numbers)


@DRAWN
@FEW
def test_it_is_adamw(seed: int, exponent: float, rate: float, decay: float, eps: float, steps: int) -> None:
    found = gradients(seed, exponent, steps)
    start = torch.randn(COUNT, generator=torch.Generator().manual_seed(seed + 1))
    exact = torch.nn.Parameter(start.double())
    reference = torch.optim.AdamW([exact], lr=rate, betas=BETAS, eps=eps, weight_decay=decay, foreach=False)
    for gradient in found:
        exact.grad = gradient.double()
        reference.step()
    updated(start, found, rate, decay, eps, None)
    bound = 2e-6 * (1 + float(start.abs().max()))
    assert float((start.double() - exact.detach()).abs().max()) <= bound


@DRAWN
@FEW
def test_a_master_is_updated_as_a_weight_in_fp32(
    seed: int, exponent: float, rate: float, decay: float, eps: float, steps: int
) -> None:
    found = gradients(seed, exponent, steps)
    start = torch.randn(COUNT, generator=torch.Generator().manual_seed(seed + 1))
    weight, dropped = torch.empty(COUNT, dtype=torch.bfloat16), torch.empty(COUNT, dtype=torch.int16)
    split(start.clone(), weight, dropped)
    updated(start, found, rate, decay, eps, None)
    updated(weight, found, rate, decay, eps, dropped)
    assert torch.equal(joined(weight, dropped), start)
