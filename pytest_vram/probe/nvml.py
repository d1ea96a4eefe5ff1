"""What NVML says of a card: the process's bytes, and everybody's. Through ``nvidia-ml-py`` (the extra ``nvml``)."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pytest_vram.errors import ProbeUnavailable
from pytest_vram.memory import Device, Peak
from pytest_vram.probe.base import PlainProbe

if TYPE_CHECKING:
    from pytest_vram.memory import Kind

_FOREIGN_TOLERANCE = 1 << 20


def process_bytes(uuid: str | None, index: int) -> int | None:
    """Bytes that this process holds on a card, without those below it; ``None`` where the driver does not say.

    Args:
        uuid: of the card; index 0 of NVML need not be torch's ``cuda:0``.
        index: used where no uuid is known.

    Raises:
        ProbeUnavailable: no NVML.
    """
    pynvml = _nvml()
    return _bytes_of(pynvml, _handle(pynvml, uuid, index), {os.getpid()})


class NvmlProbe(PlainProbe):
    """Samples the whole process on a card, for programs whose memory torch does not manage.

    NVML has no peak counter: the figures are those of the moments at which the plugin looks (begin and end of a test
    and of its phases), which the kind ``nvml`` says. When another process's memory moved in between, the figure is
    contaminated.
    """

    kind: Kind = "nvml"

    def __init__(self) -> None:
        self._pynvml = _nvml()
        self._handles = [_handle(self._pynvml, uuid, index) for index, uuid in enumerate(_visible(self._pynvml))]
        self._highest = [0] * len(self._handles)
        self._foreign = self._foreign_bytes()
        self._moved = [False] * len(self._handles)

    def devices(self) -> tuple[Device, ...]:
        """Visible cards."""
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
        """Bytes of this process and of those below it on each card, now."""
        own = {os.getpid(), *descendants()}
        return tuple(_bytes_of(self._pynvml, handle, own) or 0 for handle in self._handles)

    def peak(self) -> tuple[Peak, ...]:
        """The largest sample."""
        now = self.allocated()
        self._highest = [max(a, b) for a, b in zip(self._highest, now, strict=True)]
        for index, (before, after) in enumerate(zip(self._foreign, self._foreign_bytes(), strict=True)):
            self._moved[index] |= abs(after - before) > _FOREIGN_TOLERANCE
        return tuple(Peak(device_bytes=value) for value in self._highest)

    def reset_peak(self) -> None:
        """Start from now."""
        self._highest = list(self.allocated())

    def free_bytes(self, index: int) -> int | None:
        """What the card has left."""
        return int(self._pynvml.nvmlDeviceGetMemoryInfo(self._handles[index]).free)

    def contaminated(self) -> tuple[bool, ...]:
        """Whether another process's memory moved since the test began."""
        return tuple(self._moved)

    def begin_test(self, *, record: bool, timeline: bool = False) -> None:
        """Remember what others hold."""
        self._foreign = self._foreign_bytes()
        self._moved = [False] * len(self._handles)

    def _foreign_bytes(self) -> list[int]:
        used = [int(self._pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in self._handles]
        return [max(0, total - own) for total, own in zip(used, self.allocated(), strict=True)]


def visible_selectors(value: str | None, count: int) -> list[str]:
    """What ``CUDA_VISIBLE_DEVICES`` selects: indices and (prefixes of) UUIDs of GPUs and MIG instances, in order.

    Like the driver, it stops at the first entry that is not one.

    Args:
        value: of the variable; ``None`` selects all.
        count: cards in the machine.
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
    """Bytes that each process holds on the visible cards, all cards together, as far as NVML says; else nothing.

    Inside a container NVML may know processes by other numbers than this process does, or not at all.
    """
    sizes: dict[int, int] = {}
    try:
        nvml = _nvml()
        handles = [_handle(nvml, uuid, index) for index, uuid in enumerate(_visible(nvml))]
        for handle in handles:
            for process in (*nvml.nvmlDeviceGetComputeRunningProcesses(handle), *_graphics(nvml, handle)):
                if process.usedGpuMemory is not None:
                    sizes[process.pid] = sizes.get(process.pid, 0) + int(process.usedGpuMemory)
    except Exception:  # NVML is an extra, and says no in containers in many ways
        return {}
    return sizes


def descendants() -> set[int]:
    """Process numbers of all processes below this one (Linux)."""
    found: set[int] = set()
    pending = [os.getpid()]
    while pending:
        parent = pending.pop()
        try:
            threads = os.listdir(f"/proc/{parent}/task")
            texts = [open(f"/proc/{parent}/task/{t}/children").read() for t in threads]  # noqa: SIM115 - read at once
        except OSError:
            continue
        new = {int(pid) for text in texts for pid in text.split()} - found
        found |= new
        pending.extend(new)
    return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
