"""Read what the kernel says of a process's memory, and let the C library give back what was freed."""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING

from pytest_vram.units import KIB

if TYPE_CHECKING:
    from pathlib import Path


def read_fields(path: Path, names: tuple[str, ...]) -> dict[str, int]:
    """Return fields of a file of ``/proc`` with lines such as ``VmRSS:   123 kB``, in bytes.

    Args:
        path: the file, such as ``/proc/self/status``.
        names: the fields. Those that the file lacks are missing in the result.

    Raises:
        OSError: if the file cannot be read, as when the process has ended or the system has no ``/proc``.
    """
    found = {}
    for line in path.read_text(errors="replace").splitlines():
        name, _, rest = line.partition(":")
        if name in names:
            found[name] = int(rest.split()[0]) * KIB
    return found


def give_back_freed() -> None:
    """Make glibc return freed memory to the system. With another C library this does nothing.

    Loading a model, or an earlier test, leaves hundreds of MiB of freed memory with glibc. What is allocated next would
    be taken from there, and the resident memory would not grow by as much as the program holds.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library, or Windows
        ctypes.CDLL(None).malloc_trim(0)
