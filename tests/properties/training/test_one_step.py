"""One step is one clip of the whole window's gradient and one update; an evaluation leaves no trace."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import IGNORED, make_rows, padded, relative_l2, row_by_row_gradients, targets_of, tiny_model

import finetune.training.step
from finetune.config.settings import TrainConfig
from finetune.training.accumulate import window_gradients
from finetune.training.optim import learning_rate
from finetune.training.step import clip_gradients, evaluate, train_step

ROWS = make_rows([12, 7, 9, 15], seed=1)
WINDOW = [padded(ROWS[:3]), padded(ROWS[3:])]
STEPS = 10


@pytest.fixture
def model() -> Any:
    return tiny_model(dtype=torch.float64)


def stepped(model: Any, config: TrainConfig, window: list[Any], *, step: int = 2) -> tuple[Any, list[torch.Tensor]]:
    """The step's figures, and what it added to each parameter: plain gradient descent shows what it was given."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=123.0)
    stats = train_step(model, window, optimizer, config, step=step, total_steps=STEPS)
    assert all(p.grad is None for p in model.parameters())  # nothing is held between steps
    return stats, [p.detach() - old for p, old in zip(parameters, before, strict=True)]


def held_to_one_clip_at_the_steps_rate(model: Any, config: TrainConfig, window: list[Any], *, step: int) -> None:
    """The update is the whole window's gradient, scaled once to the clip, times the rate of this step."""
    loss, exact = row_by_row_gradients(model, ROWS, [p for p in model.parameters() if p.requires_grad])
    norm = float(torch.stack([(g**2).sum() for g in exact]).sum() ** 0.5)
    scale = min(1.0, config.clip / norm) if config.clip else 1.0
    rate = learning_rate(step, STEPS, config)
    stats, moved = stepped(model, config, window, step=step)
    assert relative_l2(moved, [-rate * scale * g for g in exact]) <= 1e-5  # torch adds 1e-6 to the norm it divides by
    assert stats.grad_norm == pytest.approx(norm)  # as it was before the clip
    assert stats.loss == pytest.approx(loss)
    assert (stats.targets, stats.tokens) == (targets_of(ROWS), sum(len(ids) for ids, _ in ROWS))
    assert stats.learning_rate == rate


@given(
    clip=st.sampled_from([0.0, 0.01, 0.5, 1e6]),
    cuts=st.sets(st.integers(1, len(ROWS) - 1)),
    step=st.integers(0, STEPS - 1),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    frozen=st.booleans(),
)
@settings(max_examples=settings.default.max_examples // 3)
def test_a_window_is_clipped_once_and_applied_at_its_steps_rate(
    clip: float, cuts: set[int], step: int, schedule: str, frozen: bool
) -> None:
    model = tiny_model(dtype=torch.float64)
    model.get_decoder().layers[0].requires_grad_(not frozen)
    config = TrainConfig(clip=clip, learning_rate=0.1, warmup_steps=4, schedule=schedule, checkpointing=False)  # type: ignore[arg-type]  # one of the Literal's values
    window = [padded(ROWS[a:b]) for a, b in pairwise([0, *sorted(cuts), len(ROWS)])]
    held_to_one_clip_at_the_steps_rate(model, config, window, step=step)


def clipping_each(model: Any, window: list[Any], config: TrainConfig) -> Any:
    """Each micro-batch's gradient, of the right weight, clipped before it is added."""
    parameters = list(model.parameters())
    total = sum(batch.targets for batch in window)
    added = [torch.zeros_like(p) for p in parameters]
    for batch in window:
        window_gradients(model, [batch], config)
        for parameter in parameters:
            parameter.grad *= batch.targets / total
        clip_gradients(parameters, config.clip)
        for held, parameter in zip(added, parameters, strict=True):
            held += parameter.grad
        model.zero_grad(set_to_none=True)
    stats = window_gradients(model, window, config)
    for held, parameter in zip(added, parameters, strict=True):
        parameter.grad = held
    return stats


def clipping_each_parameter(parameters: list[torch.nn.Parameter], clip: float) -> float:
    """As ``clip_gradients``, but for what it is the norm of."""
    norm = clip_gradients(parameters, 0.0)
    for parameter in parameters:
        clip_gradients([parameter], clip)
    return norm


MISTAKEN: dict[str, tuple[str, Any]] = {
    "each micro-batch is clipped": ("window_gradients", clipping_each),
    "each parameter is clipped": ("clip_gradients", clipping_each_parameter),
    "nothing is clipped": ("clip_gradients", lambda parameters, _: clip_gradients(parameters, 0.0)),
    "the rate of the next step": ("learning_rate", lambda step, *rest: learning_rate(step + 1, *rest)),
    "the rate of the step before": ("learning_rate", lambda step, *rest: learning_rate(step - 1, *rest)),
    "the optimizer's own rate": ("set_learning_rate", lambda optimizer, rate: None),
}


@pytest.mark.parametrize("name", MISTAKEN)
def test_the_check_rejects_another_clip_and_another_steps_rate(
    model: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune.training.step, *MISTAKEN[name])
    config = TrainConfig(clip=0.01, learning_rate=0.1, warmup_steps=4, checkpointing=False)
    with pytest.raises(AssertionError, match="relative_l2"):
        held_to_one_clip_at_the_steps_rate(model, config, WINDOW, step=2)


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
