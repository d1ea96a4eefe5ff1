"""Triton's kernels run on a CPU under Triton's interpreter only."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from typing import TYPE_CHECKING

import pytest
import torch

from finetune.config.settings import RunConfig
from finetune.estimate.activations import liger_norms
from finetune.kernels import available
from finetune.kernels.available import kernel_runs_on

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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


@pytest.mark.parametrize(
    ("compiler", "named", "headers", "dry", "runs"),
    [
        ("gcc", None, True, False, True),
        ("clang", None, True, False, True),
        ("mycc", "mycc", True, False, True),
        ("gcc", "mycc", True, False, False),  # Triton takes the one that is named
        (None, None, True, False, False),
        ("gcc", None, False, False, False),
        (None, None, False, True, True),
    ],
)
def test_a_card_needs_a_compiler_and_pythons_headers(
    compiler: str | None,
    named: str | None,
    headers: bool,
    dry: bool,
    runs: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if headers:
        (tmp_path / "Python.h").write_text("")
    monkeypatch.delenv("CC", raising=False)
    if named is not None:
        monkeypatch.setenv("CC", named)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name == compiler else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(available, "is_active", lambda: dry)
    assert kernel_runs_on(torch.device("cuda")) is runs
    assert liger_norms(RunConfig()) is runs
