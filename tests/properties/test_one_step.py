"""One step is one clip of the whole window's gradient and one update; an evaluation leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import IGNORED, make_rows, padded, row_by_row_gradients, targets_of, tiny_model

from finetune.config import TrainConfig
from finetune.optim import learning_rate
from finetune.step import evaluate, train_step

ROWS = make_rows([12, 7, 9, 15], seed=1)
WINDOW = [padded(ROWS[:3]), padded(ROWS[3:])]


@pytest.fixture
def model() -> Any:
    return tiny_model(dtype=torch.float64)


def stepped(model: Any, config: TrainConfig, window: list[Any], *, step: int = 2) -> tuple[Any, list[torch.Tensor]]:
    """The step's figures, and what it added to each parameter: plain gradient descent shows what it was given."""
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    stats = train_step(model, window, optimizer, config, step=step, total_steps=10)
    assert all(p.grad is None for p in model.parameters())  # nothing is held between steps
    return stats, [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]


@pytest.mark.parametrize("clip", [0.0, 0.01, 0.5, 1e6])
def test_the_update_is_the_clipped_gradient_of_the_whole_window(model: Any, clip: float) -> None:
    config = TrainConfig(clip=clip, learning_rate=0.1, warmup_steps=4, checkpointing=False)
    loss, exact = row_by_row_gradients(model, ROWS, list(model.parameters()))
    norm = float(torch.stack([(g**2).sum() for g in exact]).sum() ** 0.5)
    scale = min(1.0, clip / norm) if clip else 1.0
    rate = learning_rate(2, 10, config)
    stats, moved = stepped(model, config, WINDOW)
    for change, gradient in zip(moved, exact, strict=True):
        assert torch.allclose(change, -rate * scale * gradient, rtol=1e-5, atol=1e-12)
    assert stats.grad_norm == pytest.approx(norm)  # as it was before the clip
    assert stats.loss == pytest.approx(loss)
    assert (stats.targets, stats.tokens) == (targets_of(ROWS), sum(len(ids) for ids, _ in ROWS))
    assert stats.learning_rate == rate == pytest.approx(0.1 * 3 / 5)  # the third of four on the way up


def test_a_window_without_a_target_moves_nothing(model: Any) -> None:
    rows = [(ids, [IGNORED] * len(ids)) for ids, _ in ROWS]
    stats, moved = stepped(model, TrainConfig(checkpointing=False), [padded(rows)])
    assert (stats.targets, stats.grad_norm) == (0, 0.0)
    assert not any(change.any() for change in moved)


@pytest.mark.parametrize("training", [False, True])
def test_an_evaluation_leaves_mode_gradients_and_generators_alone(training: bool) -> None:
    model = tiny_model(attention_dropout=0.5)
    model.train(training)
    before = torch.get_rng_state()
    first = evaluate(model, WINDOW, TrainConfig())
    assert model.training == training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    assert evaluate(model, WINDOW, TrainConfig()) == first  # no dropout


def test_an_evaluation_weighs_tokens_not_batches(model: Any) -> None:
    loss, _ = row_by_row_gradients(model, ROWS, list(model.parameters()))
    stats = evaluate(model, [padded([row]) for row in ROWS], TrainConfig())
    assert stats.targets == targets_of(ROWS)
    assert stats.loss == pytest.approx(loss)
