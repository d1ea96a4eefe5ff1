"""The loss in one launch and its gradient are those of PyTorch's operators, up to rounding, for every rule of logits.

The kernel runs under Triton's interpreter here; ``tests/gpu`` has it on a card.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from finetune.model.loss import KERNEL, LogitRule, chunked_cross_entropy

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("triton")
FEW = settings(max_examples=max(10, settings.default.max_examples // 4), deadline=None)
HIDDEN = 8
RULES = [
    LogitRule(),
    LogitRule(scale=0.25),
    LogitRule(softcap=5.0),
    LogitRule(scale=3.0, softcap=2.0),
    LogitRule(words=17),
    LogitRule(scale=0.5, softcap=4.0, words=18),
]


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    """The module, under Triton's interpreter, which is chosen when a kernel is defined."""
    name = "finetune.kernels.cross_entropy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        patch.setattr(module, "_BLOCK", 16)  # so that a row of a test takes several
        yield module
    sys.modules.pop(name, None)


def of(head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, **more: Any) -> tuple[torch.Tensor, ...]:
    """The loss, and its gradients with respect to hidden states, weight and bias."""
    leaf = hidden.clone().requires_grad_()
    head.zero_grad()
    loss = chunked_cross_entropy(leaf, head, targets, **more)
    loss.backward()
    assert leaf.grad is not None
    assert head.weight.grad is not None
    return loss.detach(), leaf.grad, head.weight.grad, head.bias.grad


@given(
    rows=st.integers(1, 9),
    words=st.integers(18, 70),
    chunk=st.integers(1, 10),
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([0.1, 1.0, 20.0]),
    seed=st.integers(0, 1000),
)
@FEW
def test_loss_and_gradients_are_those_of_the_operators(
    kernel: Any, rows: int, words: int, chunk: int, rule: LogitRule, dtype: torch.dtype, size: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(HIDDEN, words).to(dtype)
    for parameter in head.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = (torch.randn(rows, HIDDEN, generator=generator) * size).to(dtype)
    targets = torch.randint(0, min(words, rule.words or words), (rows,), generator=generator)
    given = {"unit": 1.0 / 7, "chunk": chunk, "rule": rule}
    expected = of(head, hidden, targets, **given)
    setattr(head, KERNEL, kernel.losses_and_gradient)
    found = of(head, hidden, targets, **given)
    assert torch.allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)
    last = torch.finfo(dtype).eps
    # The gradient of each logit is rounded to the dtype. Where a bound saturates, its slope is a small difference.
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert (one - other).float().norm() <= (2 * last + 1e-4) * other.float().norm() + 1e-6


def test_without_a_gradient_the_logits_stay(kernel: Any) -> None:
    logits, targets = torch.randn(3, 40), torch.tensor([1, 39, 0])
    kept = logits.clone()
    losses = kernel.losses_and_gradient(logits, targets, 1.0, LogitRule(), wants_gradient=False)
    assert torch.equal(logits, kept)
    assert torch.allclose(losses, nn.functional.cross_entropy(logits, targets, reduction="none"), atol=1e-5)
    assert kernel.losses_and_gradient(logits[:0], targets[:0], 1.0, LogitRule(), wants_gradient=True).shape == (0,)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy speaks, a card does not
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(kernel: Any, value: float) -> None:
    """A run that diverges is noticed by its loss."""
    logits = torch.randn(2, 40)
    logits[0, 3] = value
    losses = kernel.losses_and_gradient(logits, torch.tensor([1, 2]), 1.0, LogitRule(), wants_gradient=True)
    assert losses.isfinite().tolist() == [False, True]
    assert logits.isfinite().all(dim=1).tolist() == [False, True]
