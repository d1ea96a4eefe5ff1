"""The pre-commit hook: run the budgets of the test files that a commit changes, under a time limit."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pytest_vram.trend.measure import OutOfTimeError, run_pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

NO_TESTS = 5
"""pytest's exit code for a session without tests."""
BUDGETS = "vram or vram_ranks"
"""pytest's ``-m`` expression for the tests that have a budget."""


def check(
    paths: Sequence[str],
    arguments: Sequence[str],
    *,
    gpu: str,
    seconds: float,
    folder: Path,
    tell: Callable[[str], None],
) -> int:
    """Run the tests with a budget in these files, and return the exit code for pre-commit.

    Args:
        paths: the test files.
        arguments: more arguments for pytest.
        gpu: the value of ``--vram-gpu``.
        seconds: the time limit.
        folder: the folder to run in.
        tell: called with each message.

    Returns:
        pytest's exit code; 0 if none of the files has a test with a budget; 1 if the time limit was reached.
    """
    there = [path for path in dict.fromkeys(paths) if (folder / path).is_file()]
    if not there:
        return 0
    began = time.monotonic()
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "-m", BUDGETS]
    try:
        code = run_pytest([*options, *arguments, *there], folder=folder, gpu=gpu, seconds=seconds)
    except OutOfTimeError:
        tell(
            f"vram: the budgets of {', '.join(there)} took more than {seconds:g} s and were stopped, so they are not"
            " checked. Give the hook more time (`args: [--seconds=300]`), or leave it out once: SKIP=vram-budgets"
        )
        return 1
    if code == NO_TESTS:
        return 0
    if code == 0:
        tell(f"vram: budgets kept, {time.monotonic() - began:.0f} s")
    return code
