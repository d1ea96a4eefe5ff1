"""The probe for PyTorch's caching allocator on CUDA devices. It treats real and dry GPUs alike.

A build of torch for ROCm has the same allocator, under the same names, on AMD's GPUs.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

from pytest_vram import torch_private
from pytest_vram.drygpu import driver, notes
from pytest_vram.drygpu.values import host_reads
from pytest_vram.memory import Device, Peak
from pytest_vram.probe import history, recorder
from pytest_vram.probe.protocol import Counters

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_vram.memory import Holder, HostRead, Kind, Note, Timeline


class CudaProbe:
    """Reads torch's memory counters. It never creates a CUDA context: before the program does, every figure is 0."""

    def __init__(self) -> None:
        self.dry = driver.is_active()
        self.kind: Kind = "dry" if self.dry else "cuda"
        self._devices: tuple[Device, ...] | None = None
        self._before_reset: list[Callable[[], None]] = []
        self._patched = False
        self._history: history.History | None = None
        self._recorder: recorder.Recorder | None = None
        self._reads_before: tuple[HostRead, ...] = ()
        self._notes_before: dict[Note, int] = {}
        self._resetting = False
        self._fractions: dict[int, float] = {}
        self._beside: dict[int, tuple[int, float, int | None]] = {}

    def devices(self) -> tuple[Device, ...]:
        """Return every visible device."""
        if self._devices is None:
            self._devices = driver.devices() if self.dry else _real_devices()
        return self._devices

    def allocated(self) -> tuple[int, ...]:
        """Return the bytes in live blocks of each device."""
        return tuple(_stat(stats, "allocated_bytes", "current") for stats in self._stats())

    def peak(self) -> tuple[Peak, ...]:
        """Return the peaks of requested, allocated, reserved and device bytes since the last reset."""
        found = []
        for index, stats in enumerate(self._stats()):
            reserved = _stat(stats, "reserved_bytes", "peak")
            found.append(
                Peak(
                    requested_bytes=_stat(stats, "requested_bytes", "peak"),
                    allocated_bytes=_stat(stats, "allocated_bytes", "peak"),
                    reserved_bytes=reserved,
                    device_bytes=self._device_peak(index, stats, reserved),
                )
            )
        return tuple(found)

    def reset_peak(self) -> None:
        """Set all peaks to what is held now."""
        if not _initialized():
            return
        self._watch_resets()
        self._resetting = True
        try:
            for index in range(len(self.devices())):
                torch_private.reset_peak(index)
            if self.dry:
                driver.reset_peaks()
        finally:
            self._resetting = False

    def on_reset(self, before: Callable[[], None]) -> None:
        """Call ``before`` each time that the program under test is about to reset the peaks."""
        self._before_reset.append(before)

    def counters(self) -> tuple[Counters, ...]:
        """Return the retries and OutOfMemory errors of each device; on a dry GPU also kernels, copies and waits."""
        return tuple(
            Counters(
                retries=int(stats.get("num_alloc_retries", 0)),
                ooms=int(stats.get("num_ooms", 0)),
                work=driver.work(index) if self.dry else None,
            )
            for index, stats in enumerate(self._stats())
        )

    def free_bytes(self, index: int) -> int | None:
        """Return the bytes that the driver has left plus those that the allocator holds unused."""
        import torch

        free, _ = torch.cuda.mem_get_info(index)
        return int(free + torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index))

    def contaminated(self) -> tuple[bool, ...]:
        """Return False: the allocator counts only this process."""
        return (False,) * len(self.devices())

    def begin_test(self, *, record: bool, timeline: bool = False) -> None:
        """Record allocations from now on if ``record`` or ``timeline`` is set."""
        self._reads_before = host_reads.collect() if self.dry else ()
        self._notes_before = notes.collect() if self.dry else {}
        if (record or timeline) and "torch" in sys.modules:
            self._history = history.History()
            self._history.start()
            self._recorder = recorder.Recorder(marks=timeline)
            self._recorder.start()

    def end_test(self) -> None:
        """Stop recording."""
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None
        if self._history is not None:
            self._history.stop()
            self._history = None

    def notes(self) -> tuple[Note, ...]:
        """Return the dry GPU's assumptions since the test began, and a note if the recording is incomplete."""
        of_recording = self._history.notes() if self._history is not None else ()
        return (*(notes.since(self._notes_before) if self.dry else ()), *of_recording)

    def _recorded(self) -> recorder.Recorder | None:
        """Return the recorder; None if nothing was recorded or the recording is incomplete."""
        lost = self._history is not None and self._history.lost()
        return self._recorder if _initialized() and not lost else None

    def holders(self, index: int, top: int) -> tuple[Holder, ...]:
        """Return the places in the code that held most at the peak."""
        recorded = self._recorded()
        return recorded.holders(index, top) if recorded is not None else ()

    def left(self, index: int, top: int) -> tuple[Holder, ...]:
        """Return the places in the code whose allocations the test did not free."""
        recorded = self._recorded()
        return recorded.holders(index, top, left=True) if recorded is not None else ()

    def timeline(self, index: int) -> Timeline | None:
        """Return memory over time; None if it was not recorded."""
        recorded = self._recorded()
        return recorded.timeline(index) if recorded is not None else None

    def host_reads(self) -> tuple[HostRead, ...]:
        """Return the values read back from a dry GPU since the test began."""
        return host_reads.since(self._reads_before) if self.dry else ()

    def settle(self) -> None:
        """Free the cuBLAS workspaces.

        Each test that multiplies matrices then allocates its own workspace, whichever tests ran before it.
        """
        if _initialized():
            torch_private.clear_blas_workspaces()

    def release(self) -> None:
        """Empty the allocator's cache."""
        if _initialized():
            import torch

            torch.cuda.empty_cache()

    def cap(self, index: int, limit_bytes: int | None) -> bool:
        """Set ``torch.cuda.set_per_process_memory_fraction``; None restores the fraction from before the cap.

        The fraction limits reserved memory, so the cache is emptied first. The allocator reserves whole segments: live
        blocks within the budget can need more reserved bytes than the budget. The cap is therefore the budget plus one
        segment of each size. If a test exceeds its budget by less than that, it fails when it ends.
        """
        import torch

        if limit_bytes is None:
            torch.cuda.set_per_process_memory_fraction(self._fractions.pop(index, 1.0), index)
            return True
        torch.cuda.empty_cache()
        self._fractions[index] = torch_private.memory_fraction(index)
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (limit_bytes + _SEGMENTS) / total), index)
        return True

    def _stats(self) -> list[dict[str, Any]]:
        if not _initialized():
            return [{}] * (len(self.devices()) if "torch" in sys.modules else 0)
        self._watch_resets()
        return [torch_private.memory_stats(index) for index in range(len(self.devices()))]

    def _device_peak(self, index: int, stats: dict[str, Any], reserved_peak: int) -> int | None:
        if not stats:
            return 0
        if self.dry:
            return driver.stats(index).peak_bytes
        reserved, now = _stat(stats, "reserved_bytes", "current"), time.monotonic()
        known = self._beside.get(index)
        if known is None or known[0] != reserved or now - known[1] > _NVML_EVERY:
            known = self._beside[index] = (reserved, now, _beside_the_allocator(index, self.devices()[index], reserved))
        return None if known[2] is None else reserved_peak + known[2]

    def _watch_resets(self) -> None:
        """Patch the functions that ``torch.cuda.reset_peak_memory_stats`` calls, to notice the program's own resets."""
        if self._patched:
            return
        self._patched = True
        for name in torch_private.PEAK_RESETS:
            torch_private.put_around(name, self._announcing)

    def _announcing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def reset(*args: Any, **kwargs: Any) -> Any:
            if not self._resetting:
                for before in self._before_reset:
                    before()
            return original(*args, **kwargs)

        return reset


_NVML_EVERY = 0.05  # seconds; NVML takes longer to answer than a short test takes to run
_SEGMENTS = (2 + 20) * 2**20  # a segment for small blocks and one for large ones


def _initialized() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def _stat(stats: dict[str, Any], name: str, which: str) -> int:
    return int(stats[name]["all"][which]) if name in stats else 0


def _real_devices() -> tuple[Device, ...]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        uuid = getattr(properties, "uuid", None)
        found.append(
            Device(
                kind="cuda",
                index=index,
                name=properties.name,
                uuid=None if uuid is None else f"GPU-{uuid}",
                total_bytes=properties.total_memory,
                capability=(properties.major, properties.minor),
            )
        )
    return tuple(found)


def _beside_the_allocator(index: int, device: Device, reserved: int) -> int | None:
    """Return the bytes that this process holds on the card outside of the allocator; None without NVML.

    On a build of torch for ROCm the card is AMD's, and NVML, if it is there, knows other cards only.
    """
    import torch

    if torch.version.hip:
        return None
    with contextlib.suppress(Exception):  # NVML is an optional dependency, and fails in containers in many ways
        from pytest_vram.probe.nvml import process_bytes

        used = process_bytes(device.uuid, index)
        # A container has its own process numbers, so NVML does not find this process: the figure would be too small.
        return None if used is None or used < reserved else used - reserved
    return None
