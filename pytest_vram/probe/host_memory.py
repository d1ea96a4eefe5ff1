"""Measure the resident host memory of this process and of those that it starts (Linux).

The kernel keeps the maximum of this process (``VmHWM``), which is reset through ``/proc/self/clear_refs``. A thread
samples its descendants. Only the pages that no other process maps count for a descendant, because a forked process
shares its other pages with this one.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from pytest_vram import torch_private
from pytest_vram.memory import HostPeak
from pytest_vram.probe.nvml import descendants
from pytest_vram.process_memory import give_back_freed, read_fields
from pytest_vram.units import MIB

_EVERY, _AT_LEAST_EVERY = 0.02, 0.1  # the least and most seconds between two samples: more if a sample takes long
_SHARE = 0.1  # the share of the time that samples may take, as long as they come often enough
_FIELDS = ("VmRSS", "VmHWM", "RssAnon", "RssFile", "RssShmem")


class HostMeter:
    """Measures from its creation until ``stop``.

    Args:
        limit_bytes: the limit that the result carries.
        proc: the folder in which the kernel describes processes.
    """

    def __init__(self, limit_bytes: int, *, proc: Path = Path("/proc")) -> None:
        self._limit, self._proc = limit_bytes, proc
        self._result: HostPeak | None = None
        self.missing = _why_not(proc)
        if self.missing:
            return
        gc.collect()
        give_back_freed()
        _give_back_pinned()
        self._before = descendants()
        earlier = self._status("self")
        self._reset = self._reset_maximum()
        self._start = self._status("self")
        self._earlier_maximum = earlier["VmHWM"]
        _reset_pinned()
        self._pinned = _pinned("current") or 0
        self._largest = (self._start["VmRSS"], self._start, 0, 0)  # sum, own status, children's bytes, their number
        self._children = (0, 0)
        self._samples = 0
        self._began = time.monotonic()
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._watch()
        _pause_at_forks()
        _running.add(self)

    def stop(self) -> HostPeak:
        """End the measurement, and return what was measured. A second call returns the same."""
        if self._result is not None:
            return self._result
        if self.missing:
            self._result = HostPeak(limit_bytes=self._limit, missing=self.missing)
            return self._result
        _running.discard(self)
        self._pause()
        self._sample()
        end, start = self._status("self"), self._start["VmRSS"]
        known = self._reset or end["VmHWM"] > self._earlier_maximum
        largest, at_largest, _, _ = self._largest
        own = max(end["VmHWM"] if known else 0, at_largest["VmRSS"]) - start
        self._result = HostPeak(
            limit_bytes=self._limit,
            peak_bytes=max(0, own, largest - start),
            start_bytes=start,
            own_bytes=max(0, own),
            children_bytes=self._children[0],
            children=self._children[1],
            files_bytes=max(0, at_largest["RssFile"] - self._start["RssFile"]),
            shared_bytes=max(0, at_largest["RssShmem"] - self._start["RssShmem"]),
            pinned_bytes=None if (pinned := _pinned("peak")) is None else max(0, pinned - self._pinned),
            sampled=not known,
            interval_seconds=(time.monotonic() - self._began) / self._samples,
        )
        return self._result

    def _watch(self) -> None:
        self._over.clear()
        self._thread = threading.Thread(target=self._run, name="vram-host-memory", daemon=True)
        self._thread.start()

    def _pause(self) -> None:
        self._over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None

    def _run(self) -> None:
        pause = _EVERY
        while not self._over.wait(pause):
            began = time.monotonic()
            with contextlib.suppress(OSError):
                self._sample()
            pause = min(_AT_LEAST_EVERY, max(_EVERY, (time.monotonic() - began) / _SHARE))

    def _sample(self) -> None:
        own = self._status("self")
        sizes = [size for pid in descendants() - self._before if (size := self._private(pid))]
        self._samples += 1
        self._children = max(self._children, (sum(sizes), len(sizes)))
        self._largest = max(
            self._largest, (own["VmRSS"] + sum(sizes), own, sum(sizes), len(sizes)), key=lambda found: found[0]
        )

    def _status(self, pid: int | str) -> dict[str, int]:
        return read_fields(self._proc / str(pid) / "status", _FIELDS)

    def _private(self, pid: int) -> int:
        """Return the bytes that a process shares with nobody; 0 if it has ended."""
        with contextlib.suppress(OSError):
            found = read_fields(self._proc / str(pid) / "smaps_rollup", ("Private_Clean", "Private_Dirty"))
            return sum(found.values())
        with contextlib.suppress(OSError):  # another user's process, or a kernel without the file
            # A process that has ended, and that nobody has waited for yet, has a status without memory.
            return self._status(pid).get("RssAnon", 0)
        return 0

    def _reset_maximum(self) -> bool:
        """Set the kernel's maximum of this process to what it holds now, and return whether that worked."""
        try:
            (self._proc / "self" / "clear_refs").write_text("5")
        except OSError:
            return False
        now = self._status("self")
        return now["VmHWM"] - now["VmRSS"] < MIB


_running: weakref.WeakSet[HostMeter] = weakref.WeakSet()


@functools.cache
def _pause_at_forks() -> None:
    """Stop sampling while the program forks: Python 3.12 warns of a fork beside a thread, and tests may forbid that."""

    def pause() -> None:
        for meter in tuple(_running):
            meter._pause()

    def go_on() -> None:
        for meter in tuple(_running):
            meter._watch()

    os.register_at_fork(before=pause, after_in_parent=go_on, after_in_child=_running.clear)


def _why_not(proc: Path) -> str:
    """Return why host memory cannot be measured here; ``""`` if it can."""
    if not sys.platform.startswith("linux"):
        return f"host memory is read from /proc, which Linux has, and this is {sys.platform}"
    try:
        found = read_fields(proc / "self" / "status", _FIELDS)
    except OSError as error:
        return f"host memory is read from {proc}, which cannot be read here: {error.strerror}"
    absent = [name for name in _FIELDS if name not in found]
    if absent:
        return f"{proc}/self/status does not say {', '.join(absent)}"
    if not list((proc / "self" / "task").glob("*/children")):
        return f"this kernel does not list the processes below one ({proc}/self/task/*/children)"
    return ""


def _pinned_functions() -> Any:
    """Return ``torch.cuda`` if a CUDA context exists and this version of torch counts pinned memory."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized() or not hasattr(torch.cuda, "host_memory_stats"):
        return None
    return torch.cuda


def _reset_pinned() -> None:
    if (cuda := _pinned_functions()) is not None:
        cuda.reset_peak_host_memory_stats()


def _give_back_pinned() -> None:
    """Give unused pinned memory back to the system, because a pinned tensor that reuses it would not be counted."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch_private.empty_host_cache()


def _pinned(moment: str) -> int | None:
    """Return the bytes of pinned memory in use, as PyTorch counts them; ``None`` if it does not.

    Args:
        moment: ``current``, or ``peak`` for the most since the last reset.
    """
    if (cuda := _pinned_functions()) is None:
        return None
    found = cuda.host_memory_stats()
    # Some versions count only what PyTorch keeps for later as well.
    size = found.get(f"active_bytes.{moment}", found.get(f"allocated_bytes.{moment}"))
    return None if size is None else int(size)
