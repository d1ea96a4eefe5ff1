"""Whether a process still runs: zombies do not, nor does a process whose number another one has now."""

from __future__ import annotations

import os
import subprocess
import sys

from pytest_vram.probe import reporter


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
