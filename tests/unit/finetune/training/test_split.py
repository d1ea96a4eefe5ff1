"""A resumed run keeps its split, and a run on a CPU the one of its settings."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from finetune.config.settings import RunConfig, TrainConfig
from finetune.training.split import Split, as_recorded, chosen_split


@pytest.mark.parametrize(
    ("train", "recorded", "expected"),
    [
        (TrainConfig(), {"micro_batch": 8, "accumulation": 2}, (8, 2)),
        (TrainConfig(split="given"), {"micro_batch": 8, "accumulation": 2}, (1, 16)),
        (TrainConfig(accumulation=4), {"micro_batch": 8, "accumulation": 2}, (1, 4)),  # refused later: another window
        (TrainConfig(micro_batch=4, accumulation=4, split="given"), {"micro_batch": 8, "accumulation": 2}, (4, 4)),
    ],
)
def test_a_resumed_run_goes_on_as_it_began(
    train: TrainConfig, recorded: dict[str, Any], expected: tuple[int, int]
) -> None:
    found = as_recorded(RunConfig(train=train), recorded).train
    assert (found.micro_batch, found.accumulation) == expected


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (TrainConfig(), (12, True)),
        (TrainConfig(checkpointing="all"), ("all", True)),
        (TrainConfig(checkpointing=8), (8, True)),
        (TrainConfig(checkpointing=8, offload_activations=False), (8, False)),
        (TrainConfig(offload_activations=False), (12, False)),
        (TrainConfig(split="given"), (12, True)),
    ],
)
def test_a_resumed_run_recomputes_what_it_recomputed(train: TrainConfig, expected: tuple[Any, bool]) -> None:
    recorded = {"micro_batch": 1, "accumulation": 16, "checkpointing": 12, "offload_activations": True}
    found = as_recorded(RunConfig(train=train), recorded).train
    assert (found.checkpointing, found.offload_activations) == expected


def test_a_cpu_keeps_the_split_of_the_settings() -> None:
    config = RunConfig()
    assert chosen_split(nn.Linear(2, 2), None, config) == Split(config=config)  # type: ignore[arg-type]  # unread


def test_inputs_that_are_asked_onto_the_host_are_not_those_of_layers_that_keep_all() -> None:
    recorded = {"micro_batch": 1, "accumulation": 16, "checkpointing": "none", "offload_activations": False}
    found = as_recorded(RunConfig(train=TrainConfig(offload_activations=True)), recorded).train
    assert (found.checkpointing, found.offload_activations) == ("auto", True)
