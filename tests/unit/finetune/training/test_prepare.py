"""A resumed run has steps left, or says why it has none."""

from __future__ import annotations

import re

import pytest

from finetune.config.settings import RunConfig, TrainConfig
from finetune.errors import ConfigError
from finetune.training.prepare import _require_steps_left


@pytest.mark.parametrize(
    ("train", "told"),
    [
        (TrainConfig(max_steps=4), "max_steps = 4: 5 steps are done already"),
        (TrainConfig(epochs=1), "epochs = 1: 5 steps are done already"),
    ],
)
def test_a_run_that_is_further_than_it_is_to_go_is_refused(train: TrainConfig, told: str) -> None:
    _require_steps_left(4, 4, RunConfig(train=train))
    with pytest.raises(ConfigError, match=re.escape(told)):
        _require_steps_left(5, 4, RunConfig(train=train))
