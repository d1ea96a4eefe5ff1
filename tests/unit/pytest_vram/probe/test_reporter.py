"""Whether a process still runs: zombies do not, nor does a process whose number another one has now."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from pytest_vram.memory import Process
from pytest_vram.memory.codec import decode
from pytest_vram.probe import reporter

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_this_process_runs() -> None:
    began = reporter.started(os.getpid())
    assert began is not None
    assert reporter.runs(os.getpid(), began)
    assert reporter.runs(os.getpid(), reporter.now())


def test_a_process_that_started_later_is_another_one() -> None:
    began = reporter.started(os.getpid())
    assert began is not None
    assert not reporter.runs(os.getpid(), began - 1.0)


def test_a_process_that_ended_does_not_run_whether_or_not_its_parent_has_noticed() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.DEVNULL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # leaves the zombie behind
    assert os.path.exists(f"/proc/{child.pid}")
    assert not reporter.runs(child.pid, reporter.now())
    child.wait()
    assert not reporter.runs(child.pid, reporter.now())


def test_a_process_that_learns_its_rank_late_leaves_it_even_if_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It used a card before, and so had announced itself without a rank."""
    one = object.__new__(reporter._Reporter)
    one.folder, one.pid = tmp_path, os.getpid()
    monkeypatch.setattr(reporter, "_reporters", [one])
    monkeypatch.setattr(reporter.process_group, "place", lambda: (None, None))
    one.announce()
    monkeypatch.setattr(reporter.process_group, "place", lambda: (3, 4))
    reporter._announce_again()
    left = json.loads((tmp_path / f"{os.getpid()}.began").read_text())
    assert decode(Process, left).rank == 3
