"""Finds the child processes of a measured test that used a GPU, and reads their figures.

Each process leaves its figures (see ``reporter.py``) in a folder that an environment variable names. A process with
dry GPUs also keeps a page there from its first use of a card, which outlives the process (see ``live.py``). On a real
card, a thread watches which descendants have the driver open. So a process that used a GPU is never overlooked, even
if it left no figures.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_vram.drygpu.process.startup import inherited
from pytest_vram.drygpu.process.variables import PROCESSES_VARIABLE
from pytest_vram.errors import VramError
from pytest_vram.memory.codec import decode
from pytest_vram.memory.process import Process
from pytest_vram.probe import live, reporter
from pytest_vram.probe.nvml import descendants, process_sizes
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_vram.memory import Kind

_DRIVER = ("/dev/nvidia-uvm", "/dev/dxg")
_LOOK_EVERY = 0.05  # seconds between two looks at the descendants
_ANSWER = 5.0  # seconds in which a running process has to report its figures
_SETTLE = 2.0  # seconds in which a process has to end after its test


class Children:
    """Knows the descendants of this process, including those that have ended.

    Args:
        kind: the kind of this process's figures. On a real card, a thread watches the descendants. For CPU tensors,
            child processes are not traced, so only a test's ranks leave figures.
    """

    def __init__(self, kind: Kind) -> None:
        outer = os.environ.get(PROCESSES_VARIABLE)
        self._before = {name: os.environ.get(name) for name in (PROCESSES_VARIABLE, "PYTHONPATH")}
        self._keep = outer is not None and Path(outer).is_dir()
        self.folder = Path(tempfile.mkdtemp(prefix="vram-", dir=outer if self._keep else None))
        reporter.own(str(self.folder), reporter.owner_of(outer) if self._keep else None)
        if kind != "host":
            reporter.follow_forks()
            os.environ.update(inherited(os.environ))
            os.environ[PROCESSES_VARIABLE] = str(self.folder)
        self._watch = _Watch() if kind == "cuda" else None

    def close(self) -> None:
        """Remove the folder, and restore the environment."""
        if self._watch is not None:
            self._watch.stop()
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if not self._keep:  # otherwise the session that measures this process still reads it
            shutil.rmtree(self.folder, ignore_errors=True)

    def look(self, *, ask: bool = True) -> tuple[Process, ...]:
        """Return every process that used a GPU so far, in the order of their starts.

        Args:
            ask: ask running processes for their figures so far; without it, their figures count as missing.
        """
        found: dict[int, Process] = {}
        for path in self.folder.rglob("[0-9]*.*"):
            pid = int(path.stem) if path.stem.isdigit() else 0
            if pid and pid != os.getpid() and pid not in found:
                found[pid] = self._one(path.with_suffix(""), pid, ask=ask)
        for pid, (began, name) in (self._watch.seen if self._watch is not None else {}).items():
            if pid not in found:
                found[pid] = Process(pid=pid, name=name, began=began, missing=_missing(pid, "it does not run Python"))
        return tuple(sorted(found.values(), key=lambda process: process.began))

    def left(self, chosen: Callable[[Process], bool], *, settle: float = _SETTLE) -> tuple[Process, ...]:
        """Return the processes that still run and hold memory on a card, after waiting for those that are about to end.

        Args:
            chosen: returns whether a process is of interest.
            settle: the seconds in which processes have to end.
        """
        deadline = time.monotonic() + settle
        while True:
            running = [
                process
                for process in self.look(ask=False)
                if chosen(process) and reporter.runs(process.pid, process.began)
            ]
            if not running or time.monotonic() >= deadline:
                break
            time.sleep(0.02)
        sizes = [(process, self._holds(process)) for process in running]
        return tuple(replace(process, left=True, left_bytes=size) for process, size in sizes if size != 0)

    def _one(self, stem: Path, pid: int, *, ask: bool) -> Process:
        """Return one process, from the most complete record that it left."""
        whole, begun = _read(stem.with_suffix(".json")), _read(stem.with_suffix(".began"))
        if whole is None and begun is not None and ask:
            whole = _ask(stem, begun)
        if whole is not None:
            return whole
        page = live.read(stem.with_suffix(".live"))
        seen = self._watch.seen.get(pid) if self._watch is not None else None
        name = begun.name if begun else seen[1] if seen else reporter.command(pid)
        began = begun.began if begun else seen[0] if seen else reporter.started(pid)
        if began is None:
            began = page.began if page is not None else 0.0
        peak = sum(held.peak_bytes - held.context_bytes for held in page.held) if page is not None else None
        return Process(
            pid=pid,
            name=name,
            began=began,
            rank=begun.rank if begun else None,
            missing=_missing(pid, "no pytest_vram in its Python" if begun is None else "", peak),
            at_most_bytes=peak,
        )

    def _holds(self, process: Process) -> int | None:
        """Return the bytes that a running process holds now on all cards, or None if they are unknown."""
        pages = [live.read(path) for path in self.folder.rglob(f"{process.pid}.live")]
        if pages:
            return sum(held.used_bytes for page in pages if page is not None for held in page.held)
        return process_sizes().get(process.pid)


class _Watch:
    """Watches the descendants of this process, and notes those that have the driver open."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[float, str]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vram-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_LOOK_EVERY):
            for pid in descendants():
                if pid not in self.seen and uses_driver(pid):
                    began = reporter.started(pid)
                    self.seen[pid] = (reporter.now() if began is None else began, reporter.command(pid))


def uses_driver(pid: int) -> bool:
    """Return whether a process has the device file open that every CUDA context opens (Linux)."""
    try:
        return any(os.readlink(entry.path) in _DRIVER for entry in os.scandir(f"/proc/{pid}/fd"))
    except OSError:
        return False


def _ask(stem: Path, begun: Process) -> Process | None:
    """Ask a running process for its figures so far.

    Returns:
        Its answer, or the figures that it left if it has ended meanwhile; None if it does neither in time.
    """
    answer = stem.with_suffix(".sofar")
    answer.unlink(missing_ok=True)
    try:
        pipe = os.open(stem.with_suffix(".ask"), os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # no process reads the pipe
        return _read(stem.with_suffix(".json"))
    try:
        os.write(pipe, b"?")
    finally:
        os.close(pipe)
    deadline = time.monotonic() + _ANSWER
    while reporter.runs(begun.pid, begun.began) and time.monotonic() < deadline:
        if (found := _read(answer)) is not None:
            return found
        time.sleep(0.01)
    return _read(stem.with_suffix(".json"))


def _read(path: Path) -> Process | None:
    try:
        data: Any = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    try:
        return decode(Process, data)
    except VramError:
        return None


def _missing(pid: int, why: str, peak_bytes: int | None = None) -> str:
    """Return why a process's figures are missing."""
    if Path(f"/proc/{pid}").exists():
        state = "still runs, and did not answer when it was asked for its figures"
    else:
        state = f"ended without leaving its figures ({why or 'it was killed, or ended by os._exit'})"
    held = "" if not peak_bytes else f"; its allocator had {format_bytes(peak_bytes)} from the driver at most"
    return f"it used the GPU and {state}{held}"
