"""Whether anything is learned is found out before the first step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finetune.errors import TrainingError
from finetune.loop import require_gradients
from finetune.runlog import clock


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.ones(2, 2))
        self.lora_B = nn.ParameterDict({"used": nn.Parameter(torch.zeros(2)), "unused": nn.Parameter(torch.zeros(2))})


def test_a_matrix_without_gradient_is_named() -> None:
    model = Adapted()
    model.lora_B["used"].grad = torch.ones(2)
    with pytest.raises(TrainingError, match=r"1 of 2 adapter matrices get no gradient, the first is lora_B.unused"):
        require_gradients(model, loss=1.0)


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


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3661, "1:01:01"), (float("inf"), "?")]
)
def test_seconds_read_like_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
