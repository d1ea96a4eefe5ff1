"""A run that would learn nothing stops before its first step; random numbers and evaluations follow the steps."""

from __future__ import annotations

import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from finetune.config.settings import RunConfig
from finetune.disk.run_log import StepStats, clock
from finetune.disk.state import random_state
from finetune.errors import TrainingError
from finetune.training import loop
from finetune.training.loop import require_gradients
from finetune.training.stop import Stop


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.ones(2, 2))
        self.lora_B = nn.ParameterDict({"used": nn.Parameter(torch.zeros(2)), "unused": nn.Parameter(torch.zeros(2))})


def test_a_matrix_without_gradient_is_named() -> None:
    model = Adapted()
    model.lora_B["used"].grad = torch.ones(2)
    with pytest.raises(TrainingError, match=r"1 of 2 adapter matrices get no gradient .*, the first is lora_B.unused"):
        require_gradients(model, loss=1.0)


def test_a_model_whose_backward_pass_leads_to_no_matrix_is_not_told_to_leave_all_of_them_out() -> None:
    with pytest.raises(TrainingError, match="no gradient reaches any of the 2 weights") as caught:
        require_gradients(Adapted(), loss=1.0)
    assert "--exclude" not in str(caught.value)


def test_gradients_of_zero_everywhere_are_refused() -> None:
    model = Adapted()
    for parameter in model.lora_B.values():
        parameter.grad = torch.zeros(2)
    with pytest.raises(TrainingError, match="every gradient of the adapter is zero"):
        require_gradients(model, loss=1.0)


def test_one_gradient_of_zero_is_a_fact_of_life() -> None:
    model = Adapted()
    model.lora_B["used"].grad = torch.ones(2)
    model.lora_B["unused"].grad = torch.zeros(2)
    require_gradients(model, loss=1.0)


def test_training_every_weight_needs_every_gradient() -> None:
    model = nn.Linear(2, 2)
    model.weight.grad = torch.ones(2, 2)
    with pytest.raises(TrainingError, match="bias"):
        require_gradients(model, loss=1.0)


STATS = StepStats(loss=2.0, targets=3, tokens=5, grad_norm=1.0, learning_rate=1e-4, seconds=0.1)


class Log:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def step(self, step: int, _: StepStats) -> None:
        self.steps.append(step)


def begun(log: Log | None = None, *, start: int = 0, state: Any = None) -> Any:
    setup: Any = types.SimpleNamespace(
        config=RunConfig(), start_step=start, total_steps=9, random_state=state, model=None, optimizer=None
    )
    return loop._Loop(setup, Stop(), log)  # type: ignore[arg-type]  # stand-ins


@pytest.mark.parametrize(
    "stats",
    [replace(STATS, loss=float("nan")), replace(STATS, loss=float("inf")), replace(STATS, grad_norm=float("nan"))],
)
def test_a_number_that_is_none_stops_the_run_before_the_step_counts(
    monkeypatch: pytest.MonkeyPatch, stats: StepStats
) -> None:
    log = Log()
    running = begun(log)
    monkeypatch.setattr(loop, "train_step", lambda *_, **__: STATS)
    running._train([])
    monkeypatch.setattr(loop, "train_step", lambda *_, **__: stats)
    with pytest.raises(TrainingError, match=r"step 2: the loss is .*Lower --learning-rate"):
        running._train([])
    assert (running.step, log.steps) == (1, [1])


def test_a_resumed_run_draws_on_where_the_first_one_stopped() -> None:
    begun()
    torch.rand(3)
    state = random_state()
    expected = torch.rand(3)
    torch.rand(50)
    running = begun(start=4, state=state)
    assert torch.equal(torch.rand(3), expected)
    with running._undisturbed():
        torch.rand(7)
    assert torch.equal(torch.rand(3), expected)  # as after the steps done, whatever was drawn meanwhile


def test_a_new_run_draws_by_its_seed() -> None:
    draws = []
    for _ in range(2):
        begun()
        draws.append(torch.rand(3))
        torch.rand(11)
    assert torch.equal(*draws)


@pytest.mark.parametrize(("every", "due"), [(3, [0, 3, 6, 9, 10]), (0, [0, 10]), (10, [0, 10]), (1, list(range(11)))])
def test_what_is_done_every_few_steps_is_done_first_and_last_too(every: int, due: list[int]) -> None:
    running = begun()
    running.setup.total_steps = 10
    found = []
    for step in range(11):
        running.step = step
        if running._due(every):
            found.append(step)
    assert found == due


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3661, "1:01:01"), (float("inf"), "?")]
)
def test_seconds_read_like_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
