"""Triton's kernels run on a CPU under Triton's interpreter only."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest
import torch

from finetune.kernels.available import kernel_runs_on

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    kernel_runs_on.cache_clear()
    yield
    kernel_runs_on.cache_clear()


@pytest.mark.parametrize(("variable", "runs"), [("1", True), ("0", False), ("", False)])
def test_a_cpu_needs_the_interpreter(variable: str, runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", variable)
    assert kernel_runs_on(CPU) is runs


def test_nothing_runs_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernel_runs_on(CPU) is False
