"""Who gets a dry GPU: this process, if it asks in time, and its children; and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram.drygpu import environment

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAMS = Path(__file__).parent / "programs"


def run_plain(program: str) -> dict[str, Any]:
    """Without a dry GPU around it, which this very process may have: the program activates its own."""
    ours = {"LD_PRELOAD", "PYTEST_VRAM_DRY_CARD"}
    variables = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAMS / program)],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env={**variables, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def refusals() -> dict[str, str]:
    return run_plain("refusals.py")


@pytest.mark.parametrize(
    ("question", "parts"),
    [
        ("unknown card", ["VramUsageError", "rtx-4008", "did you mean"]),
        ("no devices", ["VramUsageError", "count=0"]),
        ("too many devices", ["VramUsageError", "count=65"]),
        ("context above total", ["VramUsageError", "total_bytes=1048576"]),
        ("a real GPU", ["DryGpuError", "replace_real_gpu=True"]),
        ("torch first", ["DryGpuError", "before torch is imported", "python -m pytest_vram run --gpu l4"]),
        ("in time", ["accepted"]),
        ("the same again", ["accepted"]),
        ("another card, not seen yet", ["accepted"]),
        ("another card, seen", ["DryGpuError", "1 x Tesla T4", "start another process"]),
    ],
)
def test_activation_is_refused_with_the_remedy(refusals: dict[str, str], question: str, parts: list[str]) -> None:
    assert all(part in refusals[question] for part in parts), refusals[question]


def test_children_inherit_the_cards() -> None:
    answers = run_plain("children.py")
    assert answers["spawn"] == answers["fork before torch"] == "1000 2 NVIDIA L4 4096"
    assert answers["subprocess"] == "2 NVIDIA L4 5"
    assert answers["loader"] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_tensors_on_the_card_go_to_other_processes(run_program: Callable[..., dict[str, Any]]) -> None:
    """They count for the process that made them; the other one gets addresses, and no memory of its own."""
    answers = run_program("shared.py", gpu="l4")
    assert answers["shape"] == [1024, 1024]
    assert answers["offset"] == 4 * 1024, "two tensors of one block have one address"
    assert answers["allocated"] == answers["used"] == 0
    assert answers["freed by the wrong call"] == 1, "cudaErrorInvalidValue"
    assert answers["sum"] == [1024, 1024]
    assert answers["exit code"] == 0
    assert answers["batches"] == [[2, 256, 1024]] * 2
    assert answers["own"] == 0


@pytest.mark.parametrize(
    ("visible", "seen"), [("1", 1), ("1,0", 2), ("", 0), ("-1", 0), ("0,7,1", 1), ("GPU-", 0), ("0,0", 0)]
)
def test_visible_devices_are_honoured_as_cuda_does(visible: str, seen: int) -> None:
    """Through the driver alone, which is 30 times faster than importing torch."""
    code = "from pytest_vram.drygpu import driver; print(driver.device_count())"
    variables = environment("l4", count=2, replace_real_gpu=True)
    variables["CUDA_VISIBLE_DEVICES"] = visible
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert int(done.stdout) == seen


def test_visible_devices_may_be_named_after_torch_is_imported(dry_python: Callable[..., Any]) -> None:
    """CUDA reads the variable when it is initialized, and NVML's count of cards, which torch asks first, heeds it."""
    code = (
        "import os, torch; os.environ['CUDA_VISIBLE_DEVICES'] = '1'; torch.ones(1, device='cuda');"
        "print(torch.cuda.device_count(), str(torch.cuda.get_device_properties(0).uuid)[-2:])"
    )
    done = dry_python("-c", code, count=2)
    assert done.stdout.split() == ["1", "01"], done.stderr


def test_a_script_that_ends_after_backward_ends_well(dry_python: Callable[..., Any]) -> None:
    """It used to abort in one run of ten: Python ends threads that ask for its lock while it shuts down."""
    for _ in range(4):
        done = dry_python(str(PROGRAMS / "exit_after_backward.py"), count=2)
        assert (done.returncode, done.stderr) == (0, "")
