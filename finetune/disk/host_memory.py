"""Reads how much host memory this process holds, and how much it may hold."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

from pytest_vram.process_memory import read_fields

_STATUS = Path("/proc/self/status")
_MACHINE = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 2**60  # without a limit, a control group says "max" or a number near 2**63


def resident_bytes() -> int:
    """Return the resident set size of this process, in bytes."""
    return _status_bytes("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return the largest resident set size that this process has had, in bytes.

    It is read from the kernel's ``VmHWM``, which starts at zero with each program. ``ru_maxrss``, which is used without
    it, also includes the peak of the parent process.
    """
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_bytes() -> int:
    """Return the most bytes this process may hold: the machine's memory, or a lower limit (control group or ulimit)."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space)
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limits.append(int((_CGROUP / name).read_text()))
        except (OSError, ValueError):
            continue
    return min(limit for limit in limits if 0 < limit < _UNLIMITED)


def available_bytes() -> int:
    """Return how many bytes can still be allocated without swapping; the limit if the system does not say."""
    found = [limit_bytes()]
    with contextlib.suppress(OSError):
        found += read_fields(_MACHINE, ("MemAvailable",)).values()
    with contextlib.suppress(OSError, ValueError):
        limit, held = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(max(0, limit - held))
    return min(found)


def pinnable_bytes() -> int:
    """Return how many bytes may still be pinned; less than 0 if too much is in use already.

    Pinned memory is never swapped out, so a twentieth of the host's memory stays free.
    """
    return available_bytes() - limit_bytes() // 20


def _status_bytes(name: str) -> int:
    """Return a field of this process's status in bytes; 0 if the kernel does not say."""
    with contextlib.suppress(OSError):
        return read_fields(_STATUS, (name,)).get(name, 0)
    return 0
