"""Measures a child process of a measured test from its first use of a GPU on, and writes its figures when it ends.

This module runs in every Python process that inherits the plugin's environment, with dry and with real GPUs. A process
that never uses a GPU writes nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing.util
import os
import sys
import threading
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from pytest_vram import process_group, torch_private
from pytest_vram.drygpu.process.variables import PROCESSES_VARIABLE
from pytest_vram.memory import Measurement
from pytest_vram.memory.codec import encode
from pytest_vram.memory.process import Process

_HOLDERS = 10
_RECENT = 0.1  # seconds of tolerance, because a process's start is known to a hundredth of a second
_SHOWN = 80  # characters of a command line
_reporters: list[_Reporter] = []
_owned: dict[str, str | None] = {}


def now() -> float:
    """Return the seconds since the machine started, a clock that all processes share."""
    if not hasattr(time, "CLOCK_BOOTTIME"):  # on macOS and Windows, no process's start is compared with this clock
        return time.monotonic()
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def started(pid: int) -> float | None:
    """Return when a process started, on the clock of :func:`now`, to a hundredth of a second; None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")


def runs(pid: int, seen: float) -> bool:
    """Return whether the process that had the id ``pid`` at a moment still runs.

    A zombie does not run. A process that started after that moment has only reused the id.

    Args:
        pid: the process id.
        seen: a moment at which the process ran, on the clock of :func:`now`.
    """
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    began = started(pid)
    return state not in ("Z", "X") and began is not None and began <= seen + _RECENT


def command(pid: int) -> str:
    """Return a process's command line, shortened, or ``"process"`` if it has ended."""
    try:
        parts = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "process"
    words = " ".join([os.path.basename(parts[0]), *parts[1:]]).split()
    return " ".join(words)[:_SHOWN] or "process"


class _Reporter:
    """Measures this process, and writes its figures."""

    def __init__(self, folder: Path) -> None:
        from pytest_vram.probe.cuda import CudaProbe
        from pytest_vram.probe.intervals import Intervals

        self.folder, self.pid = folder, os.getpid()
        self._probe = CudaProbe()
        self._intervals = Intervals(self._probe)
        self._interval = self._intervals.begin()
        self._probe.begin_test(record=True)
        self.announce()
        self._questions = folder / f"{self.pid}.ask"
        if hasattr(os, "mkfifo"):  # Windows has no named pipes of this kind, so nobody can ask this process there
            os.mkfifo(self._questions)
            threading.Thread(target=self._answer, name="vram-answers", daemon=True).start()

    def announce(self) -> None:
        """Write who this process is. If it is killed before it writes its figures, only this file remains."""
        if os.getpid() == self.pid:
            write_figures(self.folder, self._process(()), suffix="began")

    def write(self) -> None:
        """Write the figures for the whole life of the process."""
        if os.getpid() != self.pid:
            return
        measurements = tuple(m for m in self._measurements(holders=True) if used(m))
        self._probe.end_test()
        write_figures(self.folder, replace(self._process(measurements), ended=now()))
        self._questions.unlink(missing_ok=True)

    def _answer(self) -> None:
        """Write the figures so far each time another process asks, by a byte in the pipe."""
        while True:
            try:
                with self._questions.open("rb") as pipe:
                    pipe.read()
                measurements = tuple(m for m in self._measurements(holders=False) if used(m))
                write_figures(self.folder, self._process(measurements), suffix="sofar")
            except (OSError, RuntimeError):
                return  # the folder was removed, so nobody will ask any more; or the interpreter is shutting down

    def _process(self, measurements: tuple[Measurement, ...]) -> Process:
        began = started(self.pid)
        return Process(
            pid=self.pid,
            name=command(self.pid),
            began=now() if began is None else began,
            rank=process_group.place()[0],
            measurements=measurements,
        )

    def _measurements(self, *, holders: bool) -> list[Measurement]:
        peaks, counters = self._intervals.read(self._interval), self._probe.counters()
        return [
            Measurement(
                device=device,
                peak=peaks[index],
                holders=self._probe.holders(device.index, _HOLDERS) if holders else (),
                retries=counters[index].retries,
                ooms=counters[index].ooms,
                host_reads=self._probe.host_reads() if index == 0 else (),
            )
            for index, device in enumerate(self._probe.devices())
            if index < len(peaks)
        ]


def write_figures(folder: Path, process: Process, suffix: str = "json") -> None:
    """Write one process's figures to the folder atomically."""
    unfinished = folder / f".{process.pid}.{suffix}"
    unfinished.write_text(json.dumps(encode(process)))
    unfinished.replace(folder / f"{process.pid}.{suffix}")


class _Anything:
    """The object that ``register_after_fork`` needs; the function is called as long as this object lives."""


_ANYTHING = _Anything()


def own(folder: str, outer: str | None) -> None:
    """Note that this process reads ``folder``, and so reports its own figures to ``outer`` instead, if there is one."""
    _owned[folder] = outer


def owner_of(folder: str | None) -> str | None:
    """Return the folder to which this process reports if its environment names ``folder``.

    It is ``folder`` itself, unless this process reads that folder: then it is what :func:`own` named, or None.
    """
    return _owned.get(folder, folder) if folder else None


def begin() -> None:
    """Report this process's figures, measured from its first use of a GPU, if the environment names a folder.

    torch has to be imported.
    """
    folder = owner_of(os.environ.get(PROCESSES_VARIABLE))
    if folder:
        _once(os.getpid(), folder)


@cache
def _once(_pid: int, folder: str) -> None:
    torch_private.when_cuda_starts(partial(_start, folder))
    _follow_group()
    atexit.register(_finish)
    multiprocessing.util.register_after_fork(_ANYTHING, _finish_with_multiprocessing)


@cache
def _follow_group() -> None:
    process_group.when_joined(_announce_again)  # a process may use a card before it knows its rank


def _announce_again() -> None:
    for reporter in _reporters:
        with contextlib.suppress(OSError):  # as in _start
            reporter.announce()


def _finish_with_multiprocessing(_: object) -> None:
    """Register ``_finish`` with multiprocessing, whose child processes do not run atexit's functions when they end."""
    multiprocessing.util.Finalize(None, _finish, exitpriority=0)


def follow_forks() -> None:
    """Let the children that this process forks report their figures, although this process does not."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_in_child)


def _in_child() -> None:
    _reporters.clear()
    _owned.clear()
    if "torch" in sys.modules:
        begin()


def _start(folder: str) -> None:
    if not _reporters:
        with contextlib.suppress(OSError):  # the test session is over and its folder removed, so nobody reads figures
            _reporters.append(_Reporter(Path(folder)))


def _finish() -> None:
    while _reporters:
        with contextlib.suppress(OSError):
            _reporters.pop().write()


def used(measurement: Measurement) -> bool:
    """Return whether the process used the device of a measurement."""
    peak = measurement.peak
    return bool(peak.allocated_bytes or peak.reserved_bytes or peak.device_bytes)
