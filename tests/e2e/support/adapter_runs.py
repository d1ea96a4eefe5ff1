"""What two runs wrote, compared: their adapters, and the rows of their logs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

    import torch


def weights(output: Path) -> dict[str, torch.Tensor]:
    folder = output / "model"
    return load_file(
        folder / "model.safetensors" if folder.is_dir() else output / "adapter" / "adapter_model.safetensors"
    )


def column(output: Path, name: str, file: str = "train.jsonl") -> list[Any]:
    return [json.loads(line)[name] for line in (output / file).read_text().splitlines()]


def distance(output: Path, expected: Path) -> float:
    """Relative distance of two adapters, in the L2 norm."""
    ours, theirs = weights(output), weights(expected)
    assert list(ours) == list(theirs)
    square = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in theirs)
    return (square / sum(float(value.double().square().sum()) for value in theirs.values())) ** 0.5


def assert_same_run(output: Path, expected: Path) -> None:
    """Hold adapter, steps and evaluations of a run against those of another one, up to rounding."""
    assert distance(output, expected) < 1e-5
    for name in ("step", "targets", "tokens", "learning_rate"):
        assert column(output, name) == column(expected, name)
    for name in ("loss", "grad_norm"):
        assert column(output, name) == pytest.approx(column(expected, name), rel=1e-5)
    for name in ("step", "targets", "answer"):
        assert column(output, name, "eval.jsonl") == column(expected, name, "eval.jsonl")
    assert column(output, "loss", "eval.jsonl") == pytest.approx(column(expected, "loss", "eval.jsonl"), rel=1e-6)
