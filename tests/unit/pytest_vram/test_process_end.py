"""How a process ended, in words."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from pytest_vram import process_end

if TYPE_CHECKING:
    from pathlib import Path


def test_exit_codes_and_signals_are_told_apart() -> None:
    assert process_end.how(3, out_of_memory=True) == "ended with exit code 3"
    assert process_end.how(-signal.SIGSEGV, out_of_memory=True) == (
        "was killed by signal 11 (SIGSEGV), because native code crashed"
    )
    assert process_end.how(-signal.SIGUSR1, out_of_memory=None) == f"was killed by signal {signal.SIGUSR1:d} (SIGUSR1)"
    assert process_end.how(-44, out_of_memory=None) == "was killed by signal 44"


@pytest.mark.parametrize(
    ("before", "after", "cause"),
    [
        ("oom_kill 3", "oom_kill 4", "because the host's memory ran out"),
        ("oom_kill 3", "oom_kill 3", "by a person or another program"),
        ("nr_free_pages 3", "nr_free_pages 3", "most likely because the host's memory ran out"),
        (None, None, "most likely because the host's memory ran out"),
    ],
)
def test_the_kernels_count_says_whether_memory_ran_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None, after: str | None, cause: str
) -> None:
    counts = tmp_path / "vmstat"
    monkeypatch.setattr(process_end, "_VMSTAT", counts)
    if before is not None:
        counts.write_text(f"pgfault 7\n{before}\n")
    kills = process_end.memory_kills()
    if after is not None:
        counts.write_text(f"pgfault 9\n{after}\n")
    found = process_end.how(-9, out_of_memory=process_end.killed_since(kills))
    assert found.startswith(f"was killed by signal 9 (SIGKILL), {cause}")
