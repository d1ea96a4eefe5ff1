"""Settings that need bitsandbytes say so when it is missing, with a value that does without."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from finetune.config.settings import ModelConfig, TrainConfig
from finetune.errors import ConfigError
from finetune.model import load
from finetune.training.optim import make_optimizer


@pytest.fixture(autouse=True)
def _no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


def missing(setting: str, instead: str) -> str:
    remedy = f"pip install bitsandbytes, or use {instead}"
    return re.escape(f"{setting}: needs bitsandbytes, which is not installed; {remedy}")


@pytest.mark.parametrize("precision", ["nf4", "fp4", "int8"])
def test_a_quantized_precision_needs_it(precision: str) -> None:
    with pytest.raises(ConfigError, match=missing(f"precision = {precision!r}", "--precision bf16")):
        load._quantization(ModelConfig(precision=precision), torch.float32)  # type: ignore[arg-type]  # any name


@pytest.mark.parametrize("optimizer", ["paged-adamw", "paged-adamw-8bit", "adamw-8bit"])
def test_every_optimizer_but_torchs_needs_it(optimizer: str) -> None:
    config = TrainConfig(optimizer=optimizer)  # type: ignore[arg-type]  # any name
    with pytest.raises(ConfigError, match=missing(f"optimizer = {optimizer!r}", "--optimizer adamw")):
        make_optimizer([torch.nn.Parameter(torch.zeros(2))], config)


def test_torchs_optimizer_does_not() -> None:
    make_optimizer([torch.nn.Parameter(torch.zeros(2))], TrainConfig(optimizer="adamw"))
