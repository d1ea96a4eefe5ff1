"""The figures of one process of ``python -m pytest_vram run``: kept while it runs, left in a folder when it ends.

A program may reset torch's peaks as often as it likes: what they were before is kept.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing.util
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from pytest_vram.drygpu import driver, hostreads, substitutes
from pytest_vram.drygpu.variables import SNAPSHOT_VARIABLE, TIMELINE_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

_HISTORY_ENTRIES = 1_000_000
_HOLDERS = 30
_running: list[Any] = []
_PEAKS = {"peak_allocated_bytes": "allocated_bytes.all.peak", "peak_reserved_bytes": "reserved_bytes.all.peak"}
_COUNTS = ("num_alloc_retries", "num_ooms")


class Recorder:
    """Watches one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = os.getpid()
        self.peaks: dict[int, dict[str, int]] = {}
        self.counts: dict[int, dict[str, int]] = {}
        self.message = ""
        self.written = False

    def start_again(self) -> None:
        """In a forked child: figures of its own."""
        self.process, self.written = os.getpid(), False
        self.peaks.clear()
        self.counts.clear()
        hostreads.reset()
        multiprocessing.util.Finalize(None, self.write, exitpriority=0)

    def keep_peaks(self) -> None:
        """Read the peaks, before they are reset or for the record."""
        for device in _used_devices():
            statistics = torch.cuda.memory_stats(device)
            kept = self.peaks.setdefault(device, dict.fromkeys(_PEAKS, 0))
            for name, key in _PEAKS.items():
                kept[name] = max(kept[name], statistics.get(key, 0))

    def keep_counts(self) -> None:
        """Add up the counters, before they are reset or for the record."""
        for device in _used_devices():
            statistics = torch.cuda.memory_stats(device)
            kept = self.counts.setdefault(device, dict.fromkeys(_COUNTS, 0))
            for name in _COUNTS:
                kept[name] += statistics.get(name, 0)

    def write(self) -> None:
        """Leave the record. Nothing is left by a process that never used a device."""
        if self.written or os.getpid() != self.process or not _used_devices():
            return
        self.written = True
        self.keep_peaks()
        self.keep_counts()
        devices = [
            {
                "index": _physical_index(device),
                **self.peaks[device],
                **self.counts[device],
                **_driver_figures(device),
                "work": asdict(driver.work(device)),
                **_over_time(device),
            }
            for device in _used_devices()
        ]
        record = {
            "pid": os.getpid(),
            "rank": int(os.environ.get("RANK", "0")),
            "argv": sys.argv,
            "devices": devices,
            "host_reads": [asdict(read) for read in hostreads.collect()],
            "missing_functions": driver.missing_functions(),
            "not_counted": substitutes.left_out(),
            "out_of_memory": self.message,
            "versions": _versions(),
        }
        partial = self.folder / f".{os.getpid()}.json"
        partial.write_text(json.dumps(record))
        partial.rename(self.folder / f"{os.getpid()}.json")
        _write_snapshot(self.process, len(list(self.folder.glob("*.json"))) == 1)


def begin(folder: Path) -> None:
    """Watch this process, and those it forks, until they end."""
    recorder = Recorder(folder)
    _before("_cuda_resetPeakMemoryStats", recorder.keep_peaks)
    _before("_cuda_resetAccumulatedMemoryStats", recorder.keep_counts)
    _before("_accelerator_resetPeakStats", recorder.keep_peaks)
    _before("_accelerator_resetAccumulatedStats", recorder.keep_counts)
    _listen_for_out_of_memory(recorder)
    if os.environ.get(SNAPSHOT_VARIABLE):
        # A context must not exist before the program wants one: it could not fork any more.
        torch.cuda._lazy_call(_record_history)
    if os.environ.get(TIMELINE_VARIABLE):
        torch.cuda._lazy_call(_record_over_time)
    atexit.register(recorder.write)
    # A child that multiprocessing forks ends without running atexit's functions, but runs these.
    multiprocessing.util.register_after_fork(recorder, Recorder.start_again)


def _record_over_time() -> None:
    from pytest_vram.probe.history import History
    from pytest_vram.probe.recorder import Recorder as OverTime

    History().start()
    _running.append(OverTime())
    _running[0].start()


def _over_time(device: int) -> dict[str, Any]:
    if not _running:
        return {}
    timeline, holders = _running[0].timeline(device), _running[0].holders(device, _HOLDERS)
    return {"recorded": {"timeline": asdict(timeline), "holders": [asdict(holder) for holder in holders]}}


def _record_history() -> None:
    torch.cuda.memory._record_memory_history(max_entries=_HISTORY_ENTRIES, stacks="python")


def _before(name: str, action: Callable[[], None]) -> None:
    original = getattr(torch._C, name, None)
    if original is None:
        return

    def first(*args: Any, **kwargs: Any) -> Any:
        action()
        return original(*args, **kwargs)

    setattr(torch._C, name, first)


def _listen_for_out_of_memory(recorder: Recorder) -> None:
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, torch.OutOfMemoryError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            recorder.message = str(cause)
        before(kind, error, trace)

    sys.excepthook = hook


def _used_devices() -> list[int]:
    """Devices with a context. Asking torch about another one would create its context."""
    if not torch.cuda.is_initialized():
        return []
    return [device for device in range(driver.device_count()) if driver.stats(device).context_bytes]


def _physical_index(device: int) -> int:
    """The device's number before ``CUDA_VISIBLE_DEVICES``: the last byte of a dry GPU's UUID."""
    return int(str(torch.cuda.get_device_properties(device).uuid)[-2:], 16)


def _driver_figures(device: int) -> dict[str, int]:
    figures = driver.stats(device)
    return {
        "peak_device_bytes": figures.peak_bytes,
        "context_bytes": figures.context_bytes,
        "managed_bytes": figures.managed_peak_bytes,
        "total_bytes": figures.total_bytes,
    }


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


def _write_snapshot(process: int, first: bool) -> None:
    path = os.environ.get(SNAPSHOT_VARIABLE)
    if path:
        torch.cuda.memory._dump_snapshot(path if first else f"{path}.{process}")
