"""The figures of a process below a measured test: kept from its first use of a GPU on, and left when it ends.

Runs in every Python process that inherits the plugin's environment, on a dry GPU and on a real one. A process that
never uses a GPU leaves nothing.
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
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

from pytest_vram import torch_private
from pytest_vram.drygpu.process.variables import PROCESSES_VARIABLE
from pytest_vram.memory import Measurement
from pytest_vram.memory.codec import encode
from pytest_vram.memory.process import Process

_HOLDERS = 10
_RECENT = 0.1  # seconds; a start is known to a hundredth
_SHOWN = 80  # characters of a command line
_reporters: list[_Reporter] = []
_owned: dict[str, str | None] = {}
_rank_before: list[int] = []


def now() -> float:
    """Seconds since the machine started: a clock that all processes share."""
    if not hasattr(time, "CLOCK_BOOTTIME"):  # macOS and Windows, where no process's start is compared with it
        return time.monotonic()
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def started(pid: int) -> float | None:
    """When a process started, on the clock of :func:`now`, to a hundredth of a second; ``None`` if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")


def runs(pid: int, seen: float) -> bool:
    """Tell whether the process that was number ``pid`` at a moment still runs.

    A zombie does not run any more, and a process that started later has only got the number of one that ended.

    Args:
        pid: the number.
        seen: a moment when the process ran, on the clock of :func:`now`.
    """
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    began = started(pid)
    return state not in ("Z", "X") and began is not None and began <= seen + _RECENT


def command(pid: int) -> str:
    """A process's command line, shortened; ``"process"`` if it is gone."""
    try:
        parts = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "process"
    words = " ".join([os.path.basename(parts[0]), *parts[1:]]).split()
    return " ".join(words)[:_SHOWN] or "process"


class _Reporter:
    """Watches one process."""

    def __init__(self, folder: Path) -> None:
        from pytest_vram.probe.cuda import CudaProbe
        from pytest_vram.probe.intervals import Intervals

        self.folder, self.pid = folder, os.getpid()
        self._probe = CudaProbe()
        self._intervals = Intervals(self._probe)
        self._interval = self._intervals.begin()
        self._probe.begin_test(record=True)
        # Says that figures will come: a process that is killed before leaves this behind.
        (folder / f"{self.pid}.began").write_text(json.dumps(encode(self._process(()))))
        self._questions = folder / f"{self.pid}.ask"
        if hasattr(os, "mkfifo"):  # Windows has none: nobody asks there while this process runs
            os.mkfifo(self._questions)
            threading.Thread(target=self._answer, name="vram-answers", daemon=True).start()

    def write(self) -> None:
        """Leave the figures."""
        if os.getpid() != self.pid:
            return
        measurements = tuple(m for m in self._measurements(holders=True) if used(m))
        self._probe.end_test()
        write_figures(self.folder, replace(self._process(measurements), ended=now()))
        self._questions.unlink(missing_ok=True)

    def _answer(self) -> None:
        """Leave the figures so far whenever somebody asks: a byte in the pipe is a question."""
        while True:
            try:
                with self._questions.open("rb") as pipe:
                    pipe.read()
                measurements = tuple(m for m in self._measurements(holders=False) if used(m))
                write_figures(self.folder, self._process(measurements), suffix="sofar")
            except (OSError, RuntimeError):
                return  # the folder is gone, so that nobody will ask any more; or the interpreter is going

    def _process(self, measurements: tuple[Measurement, ...]) -> Process:
        began = started(self.pid)
        return Process(
            pid=self.pid,
            name=command(self.pid),
            began=now() if began is None else began,
            rank=_rank(),
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
    """Put one process's figures into the folder, whole or not at all."""
    unfinished = folder / f".{process.pid}.{suffix}"
    unfinished.write_text(json.dumps(encode(process)))
    unfinished.replace(folder / f"{process.pid}.{suffix}")


class _Anything:
    """``register_after_fork`` wants an object that lives as long as it is to be called."""


_ANYTHING = _Anything()


def own(folder: str, outer: str | None) -> None:
    """This process reads ``folder``, and does not report there: it reports to ``outer``, if there is one."""
    _owned[folder] = outer


def owner_of(folder: str | None) -> str | None:
    """Where a process reports whose environment names ``folder``: nowhere, if it has said so with :func:`own`."""
    return _owned.get(folder, folder) if folder else None


def begin() -> None:
    """Report this process's figures, from the moment it first uses a GPU. Torch is imported; no folder, no report."""
    folder = owner_of(os.environ.get(PROCESSES_VARIABLE))
    if folder:
        _once(os.getpid(), folder)


@cache
def _once(_pid: int, folder: str) -> None:
    torch_private.when_cuda_starts(partial(_start, folder))
    atexit.register(_finish)
    multiprocessing.util.register_after_fork(_ANYTHING, _finish_with_multiprocessing)


def _finish_with_multiprocessing(_: object) -> None:
    """A child of multiprocessing ends without running atexit's functions, but runs these."""
    multiprocessing.util.Finalize(None, _finish, exitpriority=0)


def follow_forks() -> None:
    """Let the children that this process forks report, although it does not report itself."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_in_child)


def _in_child() -> None:
    _reporters.clear()
    _owned.clear()
    _rank_before.clear()
    if "torch" in sys.modules:
        begin()


def _start(folder: str) -> None:
    if not _reporters:
        with contextlib.suppress(OSError):  # the test session is over, and its folder gone: nobody wants figures
            _reporters.append(_Reporter(Path(folder)))
            _remember_rank()


def _finish() -> None:
    while _reporters:
        with contextlib.suppress(OSError):
            _reporters.pop().write()


def _rank() -> int | None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    if _rank_before:
        return _rank_before[-1]
    text = os.environ.get("RANK", "")
    return int(text) if text.isdigit() else None


def _remember_rank() -> None:
    """Keep the rank when the process group is taken down: figures are left later."""
    distributed = sys.modules.get("torch.distributed")
    original = getattr(distributed, "destroy_process_group", None)
    if distributed is None or original is None or hasattr(original, "remembers_rank"):
        return

    @wraps(original)
    def destroy_process_group(*args: Any, **kwargs: Any) -> Any:
        if (rank := _rank()) is not None:
            _rank_before.append(rank)
        return original(*args, **kwargs)

    destroy_process_group.remembers_rank = True  # type: ignore[attr-defined]  # a mark on the function
    distributed.destroy_process_group = destroy_process_group  # type: ignore[attr-defined]  # a patch


def used(measurement: Measurement) -> bool:
    """Whether the process had anything on that device."""
    peak = measurement.peak
    return bool(peak.allocated_bytes or peak.reserved_bytes or peak.device_bytes)
