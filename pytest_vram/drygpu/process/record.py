"""Record the figures of one process of ``python -m pytest_vram run``, and write them to a folder when it ends.

If the program resets torch's peaks, the recorder keeps the earlier values. Each process writes one file: when torch is
imported, again when a device is first used, and with the figures when the process ends. So the file of a killed process
has no figures. Times are those of the monotonic clock, which all processes share.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing.process
import multiprocessing.util
import os
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pytest_vram import process_group, torch_private
from pytest_vram.drygpu import driver, notes
from pytest_vram.drygpu.process.variables import EXIT_SUFFIX, RECORD_VARIABLE, SNAPSHOT_VARIABLE, TIMELINE_VARIABLE
from pytest_vram.drygpu.values import host_reads
from pytest_vram.memory.codec import encode
from pytest_vram.memory.run_record import CardRecord, RunRecord

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from pytest_vram.memory import Holder, Note, Timeline

_HISTORY_ENTRIES = 1_000_000
_HOLDERS = 30
_LONGEST = 200  # characters of an error's first line
_NCCL_REFUSED = "out of memory: the card has no room for the buffers of NCCL's connections"  # the text of native/nccl.c
_running: list[tuple[Any, Any]] = []
_PEAKS = {"peak_allocated_bytes": "allocated_bytes.all.peak", "peak_reserved_bytes": "reserved_bytes.all.peak"}
_COUNTS = ("num_alloc_retries", "num_ooms")


class ProcessRecorder:
    """Records the figures of one process; the program may reset torch's counters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.forked = False
        self._reset()
        self.save()
        driver.write_exit(str(self.path.with_suffix(EXIT_SUFFIX)))

    def _reset(self) -> None:
        self.process = os.getpid()
        self.path = self.folder / f"{self.process}-{time.monotonic_ns()}.json"
        self.peaks: dict[int, dict[str, int]] = {}
        self.counts: dict[int, dict[str, int]] = {}
        self.message = ""
        self.written = False
        self.record = RunRecord(
            pid=self.process,
            parent=os.getppid(),
            argv=tuple(str(argument) for argument in getattr(sys, "argv", ())),
            started_ns=time.monotonic_ns(),
        )

    def start_again(self) -> None:
        """Begin a new record in a forked child. It is written only if the child uses a device or fails."""
        self._reset()
        host_reads.reset()
        notes.reset()
        self.forked = True

    def end_with_multiprocessing(self) -> None:
        """Write the record at the end of a multiprocessing child, which may not run functions of ``atexit``."""
        multiprocessing.util.Finalize(None, self.write, exitpriority=0)

    def save(self) -> None:
        """Write the record as it is now, atomically.

        If the folder cannot be written to, the program goes on and its figures are missing.
        """
        self.record = _with_place(self.record)
        partial = self.folder / f".{self.path.name}"
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps(encode(self.record)))
            partial.rename(self.path)

    def use(self) -> None:
        """Record the time at which a device is first used."""
        if self.record.used_ns is None:
            self.record = replace(self.record, used_ns=time.monotonic_ns())
            self.save()

    def joined(self) -> None:
        """Save the rank of a process that has joined a process group."""
        if not self.written and os.getpid() == self.process and not self._left_out():
            self.save()

    def ended(self, code: int) -> None:
        """Record the exit code of a multiprocessing child that is about to end."""
        if os.getpid() == self.process and (code or not self._left_out()):
            self.record = replace(self.record, exit_code=code, ended_ns=time.monotonic_ns())
            self.save()

    def _left_out(self) -> bool:
        """Whether this is a forked helper without a device, such as a data loader's worker."""
        return self.forked and self.record.used_ns is None

    def keep_peaks(self) -> None:
        """Merge torch's peaks into those of the record. It runs before every reset and at the end."""
        for device in _used_devices():
            statistics = torch.cuda.memory_stats(device)
            kept = self.peaks.setdefault(device, dict.fromkeys(_PEAKS, 0))
            for name, key in _PEAKS.items():
                kept[name] = max(kept[name], statistics.get(key, 0))

    def keep_counts(self) -> None:
        """Add torch's counters to those of the record. It runs before every reset and at the end."""
        for device in _used_devices():
            statistics = torch.cuda.memory_stats(device)
            kept = self.counts.setdefault(device, dict.fromkeys(_COUNTS, 0))
            for name in _COUNTS:
                kept[name] += statistics.get(name, 0)

    def write(self) -> None:
        """Write the record with the figures of the devices that were used."""
        if self.written or os.getpid() != self.process or self._left_out():
            return
        self.written = True
        self.keep_peaks()
        self.keep_counts()
        devices = tuple(self._card(device) for device in _used_devices())
        self.record = replace(
            self.record,
            devices=devices,
            ended_ns=time.monotonic_ns(),
            host_reads=host_reads.collect(),
            missing_functions=driver.missing_functions(),
            notes=(*notes.so_far(), *_of_recording()),
            out_of_memory=self.message,
            versions=_versions(),
        )
        self.save()
        if devices:
            _write_snapshot(self.process)

    def _card(self, device: int) -> CardRecord:
        figures, counts = driver.stats(device), self.counts[device]
        timeline, holders = _over_time(device)
        return CardRecord(
            index=_physical_index(device),
            **self.peaks[device],
            peak_device_bytes=figures.peak_bytes,
            context_bytes=figures.context_bytes,
            nccl_bytes=figures.links_peak_bytes,
            managed_bytes=figures.managed_peak_bytes,
            total_bytes=figures.total_bytes,
            num_alloc_retries=counts["num_alloc_retries"],
            num_ooms=counts["num_ooms"] + figures.links_refusals,
            work=driver.work(device),
            timeline=timeline,
            holders=holders,
        )


def begin(folder: Path) -> None:
    """Record this process and the processes that it forks, until they end."""
    recorder = ProcessRecorder(folder)
    for name in torch_private.PEAK_RESETS:
        _before(name, recorder.keep_peaks)
    for name in torch_private.COUNT_RESETS:
        _before(name, recorder.keep_counts)
    _listen_for_errors(recorder)
    if os.environ.get(SNAPSHOT_VARIABLE):
        # This must not create a CUDA context before the program does: a process with a context cannot fork.
        torch_private.when_cuda_starts(_record_history)
    if os.environ.get(TIMELINE_VARIABLE):
        torch_private.when_cuda_starts(_record_over_time)
    torch_private.when_cuda_starts(recorder.use)
    process_group.when_joined(recorder.joined)  # a process that is killed leaves what was saved before
    atexit.register(recorder.write)
    os.register_at_fork(after_in_child=recorder.start_again)
    multiprocessing.util.register_after_fork(recorder, ProcessRecorder.end_with_multiprocessing)
    _listen_for_exit_codes(recorder)


def _record_over_time() -> None:
    from pytest_vram.probe.history import History
    from pytest_vram.probe.recorder import Recorder

    history, recorder = History(), Recorder()
    history.start()
    recorder.start()
    _running.append((history, recorder))


def _over_time(device: int) -> tuple[Timeline | None, tuple[Holder, ...]]:
    """Return memory over time and who held the peak; None and nothing if they were not recorded."""
    if not _running or _running[0][0].lost():
        return None, ()
    recorder = _running[0][1]
    return recorder.timeline(device), tuple(recorder.holders(device, _HOLDERS))


def _record_history() -> None:
    torch_private.record_history(_HISTORY_ENTRIES)


def _before(name: str, action: Callable[[], None]) -> None:
    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def first(*args: Any, **kwargs: Any) -> Any:
            action()
            return original(*args, **kwargs)

        return first

    torch_private.put_around(name, around)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether the card had no room: for PyTorch's allocator, or for NCCL, whose error has a type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _NCCL_REFUSED in str(error)
    )


def _listen_for_errors(recorder: ProcessRecorder) -> None:
    """Record an error that ends the program, and an out-of-memory error that ends a thread."""
    before, before_thread = sys.excepthook, threading.excepthook

    def note(error: BaseException | None, *, ends_program: bool) -> None:
        cause = error
        while cause is not None and not _is_out_of_memory(cause):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            recorder.message = str(cause)
        if error is not None and (ends_program or cause is not None):
            lines = str(error).strip().splitlines()
            raised = type(error).__name__ + (f": {lines[0][:_LONGEST]}" if lines else "")
            recorder.record = replace(recorder.record, raised=raised)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        note(error, ends_program=True)
        before(kind, error, trace)

    def thread_hook(details: threading.ExceptHookArgs) -> None:
        note(details.exc_value, ends_program=False)
        before_thread(details)

    sys.excepthook, threading.excepthook = hook, thread_hook


def _listen_for_exit_codes(recorder: ProcessRecorder) -> None:
    """Record the exit codes of multiprocessing children, because ``sys.excepthook`` does not see their errors.

    ``BaseProcess._bootstrap`` is private, and the same from Python 3.8 to 3.14: it runs the child and returns its code.
    """
    original = multiprocessing.process.BaseProcess._bootstrap  # type: ignore[attr-defined]  # private, and so not in the stubs

    def bootstrap(self: Any, *args: Any, **kwargs: Any) -> int:
        code = int(original(self, *args, **kwargs))
        recorder.ended(code)
        return code

    multiprocessing.process.BaseProcess._bootstrap = bootstrap  # type: ignore[attr-defined]  # private, and so not in the stubs


def _with_place(record: RunRecord) -> RunRecord:
    """Return the record with this process's rank and group, and what else launchers set."""
    return replace(
        record,
        rank=process_group.place()[0],
        local_rank=_number("LOCAL_RANK"),
        local_world_size=_number("LOCAL_WORLD_SIZE"),
        restart=_number("TORCHELASTIC_RESTART_COUNT"),
        group=os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("MASTER_PORT") or "",
    )


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else None


def _of_recording() -> tuple[Note, ...]:
    return _running[0][0].notes() if _running else ()


def _used_devices() -> list[int]:
    """Return the devices with a context. Asking torch about another device would create its context."""
    if not torch.cuda.is_initialized():
        return []
    return [device for device in range(driver.device_count()) if driver.stats(device).context_bytes]


def _physical_index(device: int) -> int:
    """Return the device's number without ``CUDA_VISIBLE_DEVICES``, from the last byte of a dry GPU's UUID."""
    return int(str(torch.cuda.get_device_properties(device).uuid)[-2:], 16)


def _versions() -> dict[str, str | None]:
    from pytest_vram import __version__

    names = ("transformers", "peft", "bitsandbytes", "accelerate", "trl", "triton")
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in names}
    return {
        "python": sys.version.split()[0],
        "pytest_vram": __version__,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        **{name: version for name, version in loaded.items() if version is not None},
    }


def _write_snapshot(process: int) -> None:
    """Write torch's memory history. The first process to end uses the requested name, others append their number."""
    path = os.environ.get(SNAPSHOT_VARIABLE)
    if path:
        with contextlib.suppress(FileExistsError), open(f"{os.environ[RECORD_VARIABLE]}/.snapshot", "x"):
            torch_private.dump_snapshot(path)
            return
        torch_private.dump_snapshot(f"{path}.{process}")
