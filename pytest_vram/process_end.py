"""Say how a process ended: with an exit code, or by a signal and what most likely sent it."""

from __future__ import annotations

import signal
from pathlib import Path

_VMSTAT = Path("/proc/vmstat")
_CAUSES = {
    "SIGABRT": "because native code gave up",
    "SIGBUS": "perhaps because the disk, /dev/shm or the host's memory is full",
    "SIGSEGV": "because native code crashed",
    "SIGTERM": "as a launcher does to the other ranks when one has failed",
}
_KILLED = {
    True: "because the host's memory ran out (the kernel has killed a process for that)",
    False: "by a person or another program (the kernel has killed nothing for lack of host memory)",
    None: "most likely because the host's memory ran out",
}


def memory_kills() -> int | None:
    """Return how many processes the kernel has killed so far because host memory ran out; None if it does not say."""
    try:
        lines = _VMSTAT.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def killed_since(before: int | None) -> bool | None:
    """Return whether the kernel has killed a process for lack of host memory since ``before = memory_kills()``.

    None means that the kernel does not say.
    """
    now = memory_kills()
    return None if before is None or now is None else now > before


def how(code: int, *, out_of_memory: bool | None) -> str:
    """Return how a process ended, as the rest of a sentence: ``ended with exit code 1``.

    Args:
        code: its exit code, or the negative number of the signal that ended it, as in ``Popen.returncode``.
        out_of_memory: whether the kernel killed a process for lack of host memory while this one ran: the result of
            :func:`killed_since`.
    """
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        return f"was killed by signal {-code}"
    cause = _KILLED[out_of_memory] if name == "SIGKILL" else _CAUSES.get(name, "")
    return f"was killed by signal {-code} ({name})" + (f", {cause}" if cause else "")
