"""Torch's private names exist in the torch that is installed, and one module alone uses them."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest
import torch

from pytest_vram import torch_private

ROOT = Path(__file__).resolve().parents[3]
PRIVATE = re.compile(
    r"torch\._C\.|torch\._C,|torch\.cuda\._|torch\.cuda\.memory\._|distributed_c10d\._|\._get_backend\b"
    r"|\._cdata\b|\._weak_ref\b|\._free_weak_ref\b|\._new_with_weak_ptr\b"
)


@pytest.mark.skipif(not hasattr(torch._C, "_cuda_memoryStats"), reason="torch is built without CUDA")
@pytest.mark.parametrize("name", torch_private.NAMES)
def test_a_private_name_exists(name: str) -> None:
    reduce(getattr, name.split(".")[1:], torch)


@pytest.mark.skipif(not hasattr(torch._C, "_cuda_memoryStats"), reason="torch is built without CUDA")
@pytest.mark.parametrize(
    "names", [torch_private.HISTORY_SETTERS, torch_private.PEAK_RESETS, torch_private.COUNT_RESETS]
)
def test_one_of_the_names_that_not_every_torch_has_exists(names: tuple[str, ...]) -> None:
    assert any(hasattr(torch._C, name) for name in names)


def test_no_other_module_uses_them() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for package in ("pytest_vram", "finetune")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "torch_private.py"
        for line in path.read_text().splitlines()
        if PRIVATE.search(line) and '"' not in line and "``" not in line
    ]
    assert found == []


def test_the_module_brings_in_no_torch() -> None:
    code = "import sys, pytest_vram.torch_private; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_name_that_this_torch_lacks_is_left_alone() -> None:
    torch_private.put_around("_no_such_function", lambda original: original)
    assert not hasattr(torch._C, "_no_such_function")


def test_the_snapshot_of_a_torch_without_memory_pools_takes_no_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_memorySnapshot", lambda: {"segments": []}, raising=False)
    assert torch_private.memory_snapshot() == {"segments": []}
