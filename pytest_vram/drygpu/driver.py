"""The dry GPU's own count, and the values it carries: a ctypes view of the stub libraries in this process.

Nothing here imports torch. Addresses are plain integers, as ``Tensor.data_ptr()`` returns them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pytest_vram.errors import DryGpuError
from pytest_vram.memory import Work

JournalKind = Literal[
    "malloc", "free", "refused", "create", "release", "managed", "managed_free", "host", "host_free", "context"
]
_KINDS: tuple[JournalKind, ...] = (
    "malloc",
    "free",
    "refused",
    "create",
    "release",
    "managed",
    "managed_free",
    "host",
    "host_free",
    "context",
)
_BATCH = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverStats:
    """What the stub driver counts for one device. All sizes in bytes.

    Attributes:
        total_bytes: the card's memory.
        used_bytes: taken of it now, the context included; ``total - used`` is what ``cudaMemGetInfo`` calls free.
        peak_bytes: the most that was taken since :func:`reset_peaks`.
        context_bytes: the CUDA context's part; 0 until there is a context.
        allocations: successful requests so far (cudaMalloc, cuMemCreate, growth of a pool).
        frees: allocations given back.
        refusals: requests that did not fit.
        managed_bytes: cudaMallocManaged memory (paged optimizers) asked for on this device; not in ``used_bytes``.
        managed_peak_bytes: the most of it.
        host_bytes: pinned host memory of the whole process.
        host_peak_bytes: the most of it.
    """

    total_bytes: int
    used_bytes: int
    peak_bytes: int
    context_bytes: int
    allocations: int
    frees: int
    refusals: int
    managed_bytes: int
    managed_peak_bytes: int
    host_bytes: int
    host_peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalEntry:
    """One thing the driver did. ``device`` is -1 for host memory; ``address`` is 0 where there is none."""

    kind: JournalKind
    device: int
    address: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRead:
    """One copy from device to host.

    Attributes:
        address: where on the device.
        size_bytes: how many bytes.
        device: index of the device.
        known: every byte had been written by a copy or a fill, or was marked known. A kernel may have changed it since.
        answered: the bytes came from :func:`queue_answer` or the read hook.
    """

    address: int
    size_bytes: int
    device: int
    known: bool
    answered: bool


class _Stats(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in DriverStats.__dataclass_fields__]


class _Work(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in Work.__dataclass_fields__]


class _Entry(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_uint64),
        ("size_bytes", ctypes.c_uint64),
        ("kind", ctypes.c_int32),
        ("device", ctypes.c_int32),
    ]


class _Read(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_uint64),
        ("size_bytes", ctypes.c_uint64),
        ("device", ctypes.c_int32),
        ("known", ctypes.c_int32),
        ("answered", ctypes.c_int32),
        ("padding", ctypes.c_int32),
    ]


ReadHook = Callable[[int, int, bool, int], bool]
"""``hook(address, size_bytes, known, destination) -> answered``; ``destination`` is the host address to fill."""

_HOOK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p)
_kept_hook: object = None  # ctypes does not keep a callback alive by itself


@functools.cache
def _find() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    try:
        library.pytest_vram_dry_stats  # noqa: B018 - ctypes resolves the name on access
    except AttributeError:
        return None
    for name in ("pytest_vram_dry_journal", "pytest_vram_dry_reads"):
        getattr(library, name).restype = ctypes.c_uint64
    library.pytest_vram_dry_missing.restype = ctypes.c_char_p
    library.pytest_vram_dry_note.restype = ctypes.c_char_p
    return library


def _library() -> ctypes.CDLL:
    library = _find() if is_active() else None
    if library is None:
        raise DryGpuError("this process has no dry GPU: call pytest_vram.drygpu.activate(card) before importing torch")
    return library


def is_active() -> bool:
    """Whether the stub libraries are beneath this process."""
    if _find() is None:
        _find.cache_clear()  # activate() may still load it
        return False
    return True


def device_count() -> int:
    """Return how many dry GPUs this process sees (after ``CUDA_VISIBLE_DEVICES``)."""
    return int(_library().pytest_vram_dry_device_count())


def stats(device: int = 0) -> DriverStats:
    """Return the driver's own count for one device.

    Raises:
        DryGpuError: there is no dry GPU of that index in this process.
    """
    out = _Stats()
    if not _library().pytest_vram_dry_stats(ctypes.c_int(device), ctypes.byref(out)):
        raise _no_such_device(device)
    return DriverStats(**{name: int(getattr(out, name)) for name in DriverStats.__dataclass_fields__})


def _no_such_device(device: int) -> DryGpuError:
    return DryGpuError(f"there is no dry GPU {device}: this process sees {device_count()}")


def reset_peaks() -> None:
    """Let the peaks of all devices, of managed and of pinned memory start again from what is held now."""
    _library().pytest_vram_dry_reset_peaks()


def work(device: int = 0) -> Work:
    """Return the kernels, copies and waits of one device so far.

    Raises:
        DryGpuError: there is no dry GPU of that index in this process.
    """
    out = _Work()
    if not _library().pytest_vram_dry_work(ctypes.c_int(device), ctypes.byref(out)):
        raise _no_such_device(device)
    return Work(**{name: int(getattr(out, name)) for name in Work.__dataclass_fields__})


def missing_functions() -> tuple[str, ...]:
    """Return the CUDA functions that the program called and the dry GPU has not got, in the order of first calls."""
    return _texts("pytest_vram_dry_missing")


def notes() -> tuple[str, ...]:
    """Return the assumptions that this program's figures rest on, beyond those of every dry run."""
    return _texts("pytest_vram_dry_note")


def _texts(name: str) -> tuple[str, ...]:
    function = getattr(_library(), name)
    texts: list[str] = []
    while (text := function(ctypes.c_int(len(texts)))) is not None:
        texts.append(text.decode())
    return tuple(texts)


def journal(first: int = 0) -> tuple[int, list[JournalEntry]]:
    """Return the driver's journal from entry number ``first`` on, as far as it is kept (the last 65,536 entries).

    Returns:
        The number of entries written so far, which is the ``first`` for the next call, and the entries.
    """
    total, raw = _collect("pytest_vram_dry_journal", _Entry, first)
    return total, [
        JournalEntry(kind=_KINDS[e.kind - 1], device=e.device, address=e.address, size_bytes=e.size_bytes) for e in raw
    ]


def reads(first: int = 0) -> tuple[int, list[DeviceRead]]:
    """Return the copies from device to host from number ``first`` on, as far as they are kept (the last 4,096).

    Returns:
        The number of reads so far, which is the ``first`` for the next call, and the reads.
    """
    total, raw = _collect("pytest_vram_dry_reads", _Read, first)
    return total, [
        DeviceRead(
            address=r.address,
            size_bytes=r.size_bytes,
            device=r.device,
            known=bool(r.known),
            answered=bool(r.answered),
        )
        for r in raw
    ]


def _collect(name: str, kind: type[ctypes.Structure], first: int) -> tuple[int, list[ctypes.Structure]]:
    function = getattr(_library(), name)
    collected: list[ctypes.Structure] = []
    copied = ctypes.c_uint64()
    while True:
        room = (kind * _BATCH)()
        total = int(function(ctypes.c_uint64(first), room, ctypes.c_uint64(_BATCH), ctypes.byref(copied)))
        collected += room[: copied.value]
        first = max(first + copied.value, 0)
        if copied.value < _BATCH:
            return total, collected


def is_known(address: int, size_bytes: int) -> bool | None:
    """Whether every byte of a device range holds a value that was sent there; ``None`` if it is not device memory."""
    known = int(_library().pytest_vram_dry_known(ctypes.c_uint64(address), ctypes.c_uint64(size_bytes)))
    return None if known < 0 else bool(known)


def mark_known(address: int, size_bytes: int, *, known: bool = True) -> None:
    """Declare a device range known, after writing to it; or unknown, which makes it read as zeros.

    Raises:
        DryGpuError: the range is not device memory.
    """
    ok = _library().pytest_vram_dry_mark(
        ctypes.c_uint64(address), ctypes.c_uint64(size_bytes), ctypes.c_int(int(known))
    )
    if not ok:
        raise DryGpuError(f"{address:#x} is not memory of a dry GPU")


def queue_answer(data: bytes) -> None:
    """Let the next copies from device to host of just ``len(data)`` bytes return ``data``; answers wait in a queue.

    Only the head of the queue is looked at, so an answer that nobody fetches blocks those behind it: see
    :func:`drop_answers`.

    Raises:
        DryGpuError: ``data`` is empty or above 64 KiB.
    """
    if not _library().pytest_vram_dry_queue_answer(data, ctypes.c_uint64(len(data))):
        raise DryGpuError(f"an answer of {len(data)} bytes cannot be queued: 1 to 65536 can")


def drop_answers() -> int:
    """Empty the queue of answers; returns how many nobody had fetched."""
    return int(_library().pytest_vram_dry_drop_answers())


def set_read_hook(hook: ReadHook | None) -> None:
    """Let ``hook`` see, and answer, every copy to the host that no queued answer fits; ``None`` takes it away."""
    global _kept_hook
    library = _library()
    if hook is None:
        library.pytest_vram_dry_set_read_hook(None)
        _kept_hook = None
        return
    ask = hook

    def call(address: int, size_bytes: int, known: int, destination: int) -> int:
        return int(ask(address, size_bytes, bool(known), destination))

    function = _HOOK(call)
    library.pytest_vram_dry_set_read_hook(function)
    _kept_hook = function


def set_copy_limit(size_bytes: int) -> None:
    """Let copies and fills up to ``size_bytes`` carry their values; larger ones leave zeros behind."""
    _library().pytest_vram_dry_set_copy_limit(ctypes.c_uint64(size_bytes))
