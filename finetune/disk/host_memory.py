"""What this process holds of the host's memory, and how much it may hold."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 2**60  # control groups say "max" or a number near 2**63


def resident_bytes() -> int:
    """Resident set size of this process now, in bytes."""
    return _status_bytes("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The largest resident set size this process has had, in bytes.

    Read from the kernel's ``VmHWM``, which starts anew with each program; ``ru_maxrss`` also remembers the parent's.
    """
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_bytes() -> int:
    """The most this process may hold, in bytes: the machine's memory, or a lower limit of control group or ulimit."""
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


def give_back_freed() -> None:
    """Return to the system what was freed but kept by the C library, where it is glibc; elsewhere nothing happens.

    Loading leaves hundreds of MiB of it behind, in pieces that training's larger blocks do not fit into.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status_bytes(name: str) -> int:
    try:
        text = _STATUS.read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{name}:")), 0)
