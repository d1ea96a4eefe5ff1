"""The learning rate: a pure function of the step, and what the optimizer really uses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.settings import TrainConfig
from finetune.training.optim import learning_rate, set_learning_rate

if TYPE_CHECKING:
    from collections.abc import Callable

    Rate = Callable[[int, int, TrainConfig], float]


def held_to_the_schedule(rate_of: Rate, total: int, config: TrainConfig) -> None:
    peak, warmup = config.learning_rate, config.warmup_steps
    for step in range(total):
        rate = rate_of(step, total, config)
        if step < warmup:
            assert rate == pytest.approx(peak * (step + 1) / (warmup + 1))
            continue
        done = (step - warmup) / max(1, total - warmup)
        left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.schedule]
        assert rate == pytest.approx(peak * left)
        assert 0 < rate <= peak


@given(warmup=st.integers(0, 20), total=st.integers(1, 200), schedule=st.sampled_from(["constant", "linear", "cosine"]))
def test_the_rate_rises_linearly_and_falls_as_its_schedule_says(warmup: int, total: int, schedule: str) -> None:
    config = TrainConfig(learning_rate=0.5, warmup_steps=warmup, schedule=schedule)  # type: ignore[arg-type]  # one of the Literal's values
    held_to_the_schedule(learning_rate, total, config)


def from_nothing(step: int, total: int, config: TrainConfig) -> float:
    """A first step that moves nothing."""
    return learning_rate(step, total, config) - config.learning_rate / 4 * (step < config.warmup_steps)


MISTAKEN: dict[str, Rate] = {
    "a step late": lambda step, total, config: learning_rate(max(0, step - 1), total, config),
    "a step early": lambda step, total, config: learning_rate(step + 1, total, config),
    "no warm-up": lambda step, total, config: learning_rate(step, total, replace(config, warmup_steps=0)),
    "nothing for the first step": from_nothing,
    "nothing for the last step": lambda step, total, config: learning_rate(step, total - 1, config),
    "longer by a step": lambda step, total, config: learning_rate(step, total + 1, config),
}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", MISTAKEN)
def test_the_check_rejects_a_mistaken_schedule(name: str, schedule: str) -> None:
    config = TrainConfig(learning_rate=0.5, warmup_steps=3, schedule=schedule)  # type: ignore[arg-type]  # one of the Literal's values
    held_to_the_schedule(learning_rate, 20, config)
    with pytest.raises(AssertionError, match="comparison failed"):
        held_to_the_schedule(MISTAKEN[name], 20, config)


def test_every_group_gets_the_rate() -> None:
    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 2.0}])
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
