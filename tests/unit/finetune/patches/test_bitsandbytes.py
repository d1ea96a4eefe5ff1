"""The patches of bitsandbytes' layers change what they name, and put back what they borrow."""

from __future__ import annotations

import logging
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from finetune.patches.bitsandbytes import keep_weights_unpacked, rows_by_themselves, silence_casts


def eight_bit(threshold: float) -> Any:
    """An 8-bit layer of 32 inputs and 16 outputs."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(32, 16, bias=False, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict(torch.nn.Linear(32, 16, bias=False).state_dict())
    return layer.to("cpu").requires_grad_(False)


def test_no_column_is_multiplied_apart_inside_the_block() -> None:
    model = torch.nn.Sequential(eight_bit(6.0), eight_bit(0.0), torch.nn.Linear(2, 2))
    with rows_by_themselves(model):
        assert [model[0].state.threshold, model[1].state.threshold] == [0.0, 0.0]
    assert [model[0].state.threshold, model[1].state.threshold] == [6.0, 0.0]


def test_the_thresholds_are_restored_after_an_error() -> None:
    model = torch.nn.Sequential(eight_bit(6.0), eight_bit(4.0), torch.nn.Linear(2, 2))
    with pytest.raises(KeyError), rows_by_themselves(model):
        raise KeyError
    assert [model[0].state.threshold, model[1].state.threshold] == [6.0, 4.0]


def test_no_layer_repacks_its_weights() -> None:
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    layer.support_avx512bf16_for_cpu = True  # as on a CPU that has it
    keep_weights_unpacked(torch.nn.Sequential(layer, torch.nn.Linear(2, 2)))
    assert layer.support_avx512bf16_for_cpu is False


def test_the_warning_of_every_step_is_silenced() -> None:
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    before = logger.level
    try:
        logger.setLevel(logging.NOTSET)
        silence_casts()
        assert not logger.isEnabledFor(logging.WARNING)
        assert logger.isEnabledFor(logging.ERROR)
    finally:
        logger.setLevel(before)
