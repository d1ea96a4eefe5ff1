"""The meter of host memory, in processes of its own, and on a made-up /proc."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from pytest_vram.probe.host_memory import HostMeter

if TYPE_CHECKING:
    from pathlib import Path

STATUS = "VmHWM:\t {hwm} kB\nVmRSS:\t {rss} kB\nRssAnon:\t {rss} kB\nRssFile:\t 0 kB\nRssShmem:\t 0 kB\n"


def made_up(folder: Path) -> Path:
    process = folder / "self"
    (process / "task" / "1").mkdir(parents=True)
    (process / "task" / "1" / "children").write_text("")
    (process / "status").write_text(STATUS.format(hwm=90_000, rss=10_000))
    return folder


def test_no_other_thread_is_there_when_the_program_forks() -> None:
    program = """
import os, threading
from pytest_vram.probe.host_memory import HostMeter
seen = []
os.register_at_fork(before=lambda: seen.append(threading.active_count()))  # runs after those registered later
meter = HostMeter(10**9)
before = threading.active_count()
pid = os.fork()
if not pid:
    os._exit(0)
os.waitpid(pid, 0)
print(before, seen, threading.active_count(), meter.stop().peak_bytes is not None, threading.active_count())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 [1] 2 True 1"


def test_a_process_that_has_ended_and_is_not_waited_for_holds_nothing() -> None:
    meter = HostMeter(10**9)
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    held = meter._private(child.pid)
    peak = meter.stop()
    child.wait()
    assert held == 0
    assert peak.peak_bytes is not None


def test_pinned_memory_that_is_kept_for_later_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory of earlier tests stays with PyTorch: it is returned before a test, and counts for none."""
    stats = {f"{name}_bytes.{moment}": 300 for name in ("active", "allocated") for moment in ("current", "peak")}
    emptied: list[bool] = []
    cuda = SimpleNamespace(
        is_initialized=lambda: True, host_memory_stats=lambda: stats, reset_peak_host_memory_stats=lambda: None
    )
    internal = SimpleNamespace(_host_emptyCache=lambda: emptied.append(True))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, _C=internal))
    meter = HostMeter(10**9)
    stats |= {"allocated_bytes.peak": 2000, "active_bytes.peak": 1000}
    assert (meter.stop().pinned_bytes, emptied) == (700, [True])


def test_a_maximum_that_cannot_be_reset_counts_once_the_test_raises_it(tmp_path: Path) -> None:
    proc = made_up(tmp_path)  # clear_refs is written, and changes nothing
    meter = HostMeter(1, proc=proc)
    (proc / "self" / "status").write_text(STATUS.format(hwm=90_000, rss=30_000))
    peak = meter.stop()
    assert (peak.peak_bytes, peak.sampled) == (20_000 * 1024, True)  # 90,000 kB were reached before

    meter = HostMeter(1, proc=proc)
    (proc / "self" / "status").write_text(STATUS.format(hwm=100_000, rss=30_000))
    peak = meter.stop()
    assert (peak.peak_bytes, peak.sampled) == (70_000 * 1024, False)
    assert meter.stop() is peak


def test_the_reason_is_named_where_the_kernel_says_too_little(tmp_path: Path) -> None:
    assert "No such file" in HostMeter(1, proc=tmp_path).stop().missing
    proc = made_up(tmp_path)
    (proc / "self" / "task" / "1" / "children").unlink()
    assert "does not list the processes" in HostMeter(1, proc=proc).stop().missing
    (proc / "self" / "status").write_text("VmRSS: 1 kB\n")
    assert "does not say VmHWM, RssAnon" in HostMeter(1, proc=proc).stop().missing


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_named(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    peak = HostMeter(1).stop()
    assert peak.peak_bytes is None
    assert platform in peak.missing
    assert peak.over_bytes == 0
