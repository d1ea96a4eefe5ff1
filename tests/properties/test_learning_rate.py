"""The learning rate: a pure function of the step, and what the optimizer really uses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.config import TrainConfig
from finetune.optim import learning_rate, set_learning_rate


@given(warmup=st.integers(0, 20), total=st.integers(1, 200), schedule=st.sampled_from(["constant", "linear", "cosine"]))
def test_the_rate_rises_linearly_and_falls_as_its_schedule_says(warmup: int, total: int, schedule: str) -> None:
    config = TrainConfig(learning_rate=0.5, warmup_steps=warmup, schedule=schedule)  # type: ignore[arg-type]
    for step in range(total):
        rate = learning_rate(step, total, config)
        if step < warmup:
            assert rate == pytest.approx(0.5 * (step + 1) / (warmup + 1))
            continue
        done = (step - warmup) / max(1, total - warmup)
        left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]
        assert rate == pytest.approx(0.5 * left)
        assert 0 < rate <= 0.5


def test_every_group_gets_the_rate() -> None:
    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 2.0}])
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
