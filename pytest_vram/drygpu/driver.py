"""Call the stub libraries in this process through ctypes: read what they count, and which values they carry.

This module does not import torch. Addresses are integers, as ``Tensor.data_ptr()`` returns them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from pytest_vram.errors import DryGpuError
from pytest_vram.memory import Device, Work

_CLOCK_RATE = 13  # cudaDevAttrClockRate, in kHz
_LONGEST_NAME = 256  # bytes of a card's name, as in cudaDeviceProp


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverStats:
    """The figures that the stub driver counts for one device. All sizes are in bytes.

    Attributes:
        total_bytes: the card's memory.
        used_bytes: memory in use, the context included. ``cudaMemGetInfo`` reports as free what is left of the total
            after this and after the managed memory that fits on the card.
        peak_bytes: largest ``used_bytes`` since :func:`reset_peaks`.
        context_bytes: size of the CUDA context, which grows as kernels are loaded; 0 until it exists.
        allocations: number of successful requests so far (cudaMalloc, cuMemCreate, growth of a pool).
        frees: number of allocations that were freed.
        refusals: number of requests that did not fit.
        managed_bytes: cudaMallocManaged memory (paged optimizers) of this device; it is not part of ``used_bytes``.
        managed_peak_bytes: largest ``managed_bytes`` since :func:`reset_peaks`.
        links_peak_bytes: the largest part of ``used_bytes`` that NCCL's connections took since :func:`reset_peaks`.
        links_refusals: number of NCCL's requests that did not fit; they are among ``refusals``.
        host_bytes: pinned host memory of the whole process.
        host_peak_bytes: largest ``host_bytes`` since :func:`reset_peaks`.
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
    links_peak_bytes: int
    links_refusals: int
    host_bytes: int
    host_peak_bytes: int


class _Stats(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in DriverStats.__dataclass_fields__]


class _Work(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in Work.__dataclass_fields__]


ReadHook = Callable[[int, int, bool, int], bool]
"""Called as ``hook(address, size_bytes, known, destination)`` before a copy from the device to the host.

``known`` tells whether all bytes were sent to the device. A hook that has written the answer to the host address
``destination`` returns True.
"""

_HOOK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p)
_kept_hook: object = None  # ctypes does not keep a callback alive by itself


@functools.cache
def _find() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    try:
        library.pytest_vram_dry_stats  # noqa: B018 - ctypes resolves the name on access
    except AttributeError:
        return None
    library.pytest_vram_dry_missing.restype = ctypes.c_char_p
    library.pytest_vram_dry_note.restype = ctypes.c_char_p
    return library


def _library() -> ctypes.CDLL:
    library = _find() if is_active() else None
    if library is None:
        raise DryGpuError("this process has no dry GPU: call pytest_vram.drygpu.activate(card) before importing torch")
    return library


def is_active() -> bool:
    """Whether the stub libraries are loaded in this process."""
    if _find() is None:
        _find.cache_clear()  # activate() may still load it
        return False
    return True


def cards_are_known() -> bool:
    """Whether anything has asked which cards there are. From then on they cannot be exchanged for others."""
    return bool(_library().pytest_vram_dry_cards_are_known())


def device_count() -> int:
    """Return how many dry GPUs this process sees (after ``CUDA_VISIBLE_DEVICES``)."""
    return int(_library().pytest_vram_dry_device_count())


def devices() -> tuple[Device, ...]:
    """Return the dry GPUs that this process sees, described as torch describes them.

    torch itself is not asked: once it has been asked about its GPUs, the children that this process forks cannot use
    them.
    """
    library = _library()
    name, total, number = ctypes.create_string_buffer(_LONGEST_NAME), ctypes.c_size_t(), (ctypes.c_uint8 * 16)()
    major, minor = ctypes.c_int(), ctypes.c_int()
    found = []
    for index in range(device_count()):
        library.cuDeviceGetName(name, _LONGEST_NAME, index)
        library.cuDeviceTotalMem_v2(ctypes.byref(total), index)
        library.cuDeviceComputeCapability(ctypes.byref(major), ctypes.byref(minor), index)
        library.cuDeviceGetUuid_v2(number, index)
        found.append(
            Device(
                kind="dry",
                index=index,
                name=name.value.decode(),
                uuid=f"GPU-{UUID(bytes=bytes(number))}",
                total_bytes=total.value,
                capability=(major.value, minor.value),
            )
        )
    return tuple(found)


def stats(device: int = 0) -> DriverStats:
    """Return the figures that the driver counts for one device.

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
    """Set the peaks of all devices, and those of managed and pinned memory, to what is held now."""
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
    """Return the CUDA functions that the program called and the dry GPU lacks, in the order of first calls."""
    function = _library().pytest_vram_dry_missing
    names: list[str] = []
    while (name := function(ctypes.c_int(len(names)))) is not None:
        names.append(name.decode())
    return tuple(names)


def notes() -> tuple[str, ...]:
    """Return the assumptions of the stub libraries that this program's figures rest on, as ``name: text``."""
    return tuple(dict.fromkeys(text for text, _ in note_counts()))


def note_counts() -> dict[tuple[str, int], int]:
    """Return how often each assumption of :func:`notes` was made, in the order of first occurrence.

    A key has the text and the size in bytes of what the assumption was about, 0 if it has none. Sizes within a
    sixteenth of each other share a key.
    """
    _library().pytest_vram_dry_settle()
    function, count, size = _library().pytest_vram_dry_note, ctypes.c_uint64(), ctypes.c_uint64()
    found: dict[tuple[str, int], int] = {}
    index = 0
    while (text := function(ctypes.c_int(index), ctypes.byref(count), ctypes.byref(size))) is not None:
        found[text.decode(), size.value] = count.value
        index += 1
    return found


def clock_mhz(device: int = 0) -> int:
    """Return the highest clock of a dry GPU's multiprocessors, in MHz.

    Raises:
        DryGpuError: there is no dry GPU of that index in this process.
    """
    value = ctypes.c_int()
    if _library().cudaDeviceGetAttribute(ctypes.byref(value), _CLOCK_RATE, ctypes.c_int(device)) != 0:
        raise DryGpuError(f"there is no dry GPU {device}: this process sees {device_count()}")
    return value.value // 1000


def write_exit(path: str) -> None:
    """Make this process write its exit code and the time to ``path`` when it ends.

    The time is in nanoseconds of the monotonic clock. A process that ends by a signal or ``os._exit`` writes nothing.

    Raises:
        DryGpuError: the path is longer than 4,095 bytes.
    """
    if not _library().pytest_vram_dry_write_exit(path.encode()):
        raise DryGpuError(f"the exit code cannot be written to {path}")


def is_known(address: int, size_bytes: int) -> bool | None:
    """Whether every byte of a device range was sent there by the program; ``None`` if it is not device memory."""
    known = int(_library().pytest_vram_dry_known(ctypes.c_uint64(address), ctypes.c_uint64(size_bytes)))
    return None if known < 0 else bool(known)


def mark_known(address: int, size_bytes: int, *, known: bool = True) -> None:
    """Mark a device range as known, after writing to it, or as unknown, so that it reads as zeros.

    Raises:
        DryGpuError: the range is not device memory.
    """
    ok = _library().pytest_vram_dry_mark(
        ctypes.c_uint64(address), ctypes.c_uint64(size_bytes), ctypes.c_int(int(known))
    )
    if not ok:
        raise DryGpuError(f"{address:#x} is not memory of a dry GPU")


def release_zeros(address: int, size_bytes: int) -> int:
    """Give the pages of pinned host memory back that hold zeros only; they read as zeros still.

    Nothing else may write to the range meanwhile.

    Returns:
        how many bytes were given back: 0 if the range is not pinned memory.
    """
    function = _library().pytest_vram_dry_release_zeros
    function.restype = ctypes.c_uint64
    return int(function(ctypes.c_uint64(address), ctypes.c_uint64(size_bytes)))


def set_read_hook(hook: ReadHook | None) -> None:
    """Call ``hook`` before every copy from the device to the host, so that it can answer it; ``None`` removes it."""
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


def add_note(text: str) -> None:
    """Add an assumption that this program's figures rest on, once; see :func:`notes`."""
    if text not in notes():
        _library().pytest_vram_dry_add_note(text.encode())


def stand_alone() -> None:
    """Say that this process stands for one rank of many, so that no other rank is waited for."""
    _library().pytest_vram_dry_set_alone(ctypes.c_int(1))
