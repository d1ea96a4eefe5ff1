"""Read how much memory each process holds on a card, from NVML, which needs ``nvidia-ml-py`` (extra ``nvml``)."""

from __future__ import annotations

import contextlib
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_vram.errors import ProbeUnavailable
from pytest_vram.memory import Device, Peak
from pytest_vram.probe.base import PlainProbe

if TYPE_CHECKING:
    from pytest_vram.memory import Kind

_FOREIGN_TOLERANCE = 1 << 20


def process_bytes(uuid: str | None, index: int) -> int | None:
    """Return the bytes that this process holds on a card, without its children; ``None`` if the driver does not say.

    Args:
        uuid: the card's UUID, because NVML may number the cards differently from torch.
        index: NVML's number of the card, which is used if ``uuid`` is None.

    Raises:
        ProbeUnavailable: if NVML is not available.
    """
    pynvml = _nvml()
    return _bytes_of(pynvml, _handle(pynvml, uuid, index), {os.getpid()})


class NvmlProbe(PlainProbe):
    """Samples the whole process on a card, for programs whose memory torch does not manage.

    NVML has no peak counter. The plugin samples at the beginning and the end of a test and of its phases, so a peak in
    between is missed; the kind ``nvml`` marks such figures. A figure is contaminated if the memory of another process
    changed in the meantime.
    """

    kind: Kind = "nvml"

    def __init__(self) -> None:
        self._pynvml = _nvml()
        self._handles = [_handle(self._pynvml, uuid, index) for index, uuid in enumerate(_visible(self._pynvml))]
        self._highest = [0] * len(self._handles)
        self._foreign = self._foreign_bytes()
        self._moved = [False] * len(self._handles)

    def devices(self) -> tuple[Device, ...]:
        """Return the visible cards."""
        nvml = self._pynvml
        return tuple(
            Device(
                kind="nvml",
                index=index,
                name=_text(nvml.nvmlDeviceGetName(handle)),
                uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
                total_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            )
            for index, handle in enumerate(self._handles)
        )

    def allocated(self) -> tuple[int, ...]:
        """Return the bytes that this process and its descendants hold on each card now."""
        own = {os.getpid(), *descendants()}
        return tuple(_bytes_of(self._pynvml, handle, own) or 0 for handle in self._handles)

    def peak(self) -> tuple[Peak, ...]:
        """Take a sample, and return the largest sample since the last reset."""
        now = self.allocated()
        self._highest = [max(a, b) for a, b in zip(self._highest, now, strict=True)]
        for index, (before, after) in enumerate(zip(self._foreign, self._foreign_bytes(), strict=True)):
            self._moved[index] |= abs(after - before) > _FOREIGN_TOLERANCE
        return tuple(Peak(device_bytes=value) for value in self._highest)

    def reset_peak(self) -> None:
        """Set the peaks to what is held now."""
        self._highest = list(self.allocated())

    def free_bytes(self, index: int) -> int | None:
        """Return the free memory of the card in bytes."""
        return int(self._pynvml.nvmlDeviceGetMemoryInfo(self._handles[index]).free)

    def contaminated(self) -> tuple[bool, ...]:
        """Return whether the memory of other processes changed since the test began, for each card."""
        return tuple(self._moved)

    def begin_test(self, *, record: bool, timeline: bool = False) -> None:
        """Note what other processes hold."""
        self._foreign = self._foreign_bytes()
        self._moved = [False] * len(self._handles)

    def _foreign_bytes(self) -> list[int]:
        used = [int(self._pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in self._handles]
        return [max(0, total - own) for total, own in zip(used, self.allocated(), strict=True)]


def visible_selectors(value: str | None, count: int) -> list[str]:
    """Return the entries of ``CUDA_VISIBLE_DEVICES``: indices and (prefixes of) UUIDs of GPUs and MIG instances.

    Like the driver, it ignores the first invalid entry and everything after it.

    Args:
        value: the value of the variable; ``None`` selects all cards.
        count: the number of cards in the machine.
    """
    if value is None:
        return [str(index) for index in range(count)]
    chosen: list[str] = []
    for entry in (part.strip() for part in value.split(",")):
        if entry.startswith(("GPU-", "MIG-")) or (entry.isdigit() and int(entry) < count):
            chosen.append(entry)
        else:
            break
    return chosen


@lru_cache(maxsize=1)
def _nvml() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise ProbeUnavailable("pynvml is not installed: pip install 'pytest-vram[nvml]'") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise ProbeUnavailable(f"NVML does not start on this machine: {error}") from error
    return pynvml


def _visible(nvml: Any) -> list[str]:
    uuids = [
        _text(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(i))) for i in range(nvml.nvmlDeviceGetCount())
    ]
    found = []
    for selector in visible_selectors(os.environ.get("CUDA_VISIBLE_DEVICES"), len(uuids)):
        if selector.isdigit():
            found.append(uuids[int(selector)])
        elif selector.startswith("MIG-"):
            found.append(selector)
        else:
            found.extend(uuid for uuid in uuids if uuid.startswith(selector))
    return found


def _handle(nvml: Any, uuid: str | None, index: int) -> Any:
    return nvml.nvmlDeviceGetHandleByIndex(index) if uuid is None else nvml.nvmlDeviceGetHandleByUUID(uuid)


def _bytes_of(nvml: Any, handle: Any, own: set[int]) -> int | None:
    processes = [*nvml.nvmlDeviceGetComputeRunningProcesses(handle), *_graphics(nvml, handle)]
    sizes = {p.pid: p.usedGpuMemory for p in processes if p.pid in own}
    if any(size is None for size in sizes.values()):
        return None
    return sum(int(size) for size in sizes.values())


def _graphics(nvml: Any, handle: Any) -> list[Any]:
    try:
        return list(nvml.nvmlDeviceGetGraphicsRunningProcesses(handle))
    except nvml.NVMLError:
        return []


def process_sizes() -> dict[int, int]:
    """Return the bytes that each process holds on all visible cards together, as far as NVML reports them.

    The result is empty if NVML fails. In a container, NVML may know processes by other numbers (PIDs) than this
    process does, or not at all.
    """
    sizes: dict[int, int] = {}
    try:
        nvml = _nvml()
        handles = [_handle(nvml, uuid, index) for index, uuid in enumerate(_visible(nvml))]
        for handle in handles:
            for process in (*nvml.nvmlDeviceGetComputeRunningProcesses(handle), *_graphics(nvml, handle)):
                if process.usedGpuMemory is not None:
                    sizes[process.pid] = sizes.get(process.pid, 0) + int(process.usedGpuMemory)
    except Exception:  # NVML is an optional dependency, and fails in containers in many ways
        return {}
    return sizes


def descendants() -> set[int]:
    """Return the process ids (PIDs) of all descendants of this process (Linux)."""
    found: set[int] = set()
    pending = [os.getpid()]
    while pending:
        parent = pending.pop()
        with contextlib.suppress(OSError):  # the process has just ended
            for thread in os.listdir(f"/proc/{parent}/task"):
                with contextlib.suppress(OSError):  # the thread has just ended
                    text = Path(f"/proc/{parent}/task/{thread}/children").read_text()
                    new = {int(pid) for pid in text.split()} - found
                    found |= new
                    pending.extend(new)
    return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
