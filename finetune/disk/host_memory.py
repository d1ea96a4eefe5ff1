"""Reads how much host memory this process holds, and how much it may hold."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")
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


def give_back_freed() -> None:
    """Make glibc return freed memory to the system. With another C library this does nothing.

    Loading a model leaves hundreds of MiB of freed memory with glibc, in pieces too small for the blocks of training.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status_bytes(name: str) -> int:
    try:
        text = _STATUS.read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{name}:")), 0)
