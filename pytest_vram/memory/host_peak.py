"""The host memory that a test needed. Sizes are whole bytes."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_vram.memory.measurement import Holder


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPeak:
    """The resident memory of a test's process and of the processes that it started, above what was there before.

    Attributes:
        limit_bytes: the largest peak that passes (``max_host_gb``).
        peak_bytes: the peak above ``start_bytes``; ``None`` if it was not measured.
        start_bytes: what the test's process held when the test began: the interpreter, its libraries and fixtures that
            were set up for earlier tests. It does not count.
        own_bytes: the peak of the test's own process, above ``start_bytes``.
        children_bytes: the largest sum of what the processes below it held for themselves alone.
        children: how many processes there were in that moment.
        files_bytes: mapped files in the test's own process at the largest sample, above those at the start. The system
            can take these pages back.
        shared_bytes: shared memory there, likewise.
        pinned_bytes: the peak of pinned host memory in use, above what was in use at the start; ``None`` if torch does
            not count it.
        sampled: whether the own process was only looked at now and then, so that a shorter peak may be missing. If not,
            ``own_bytes`` is the kernel's own maximum. The processes below it are always sampled.
        interval_seconds: the time between two samples on average.
        holders: lines of code whose CPU tensors held most, if the probe knows them.
        missing: why there is no peak; ``""`` if there is one.
    """

    limit_bytes: int
    peak_bytes: int | None = None
    start_bytes: int = 0
    own_bytes: int = 0
    children_bytes: int = 0
    children: int = 0
    files_bytes: int = 0
    shared_bytes: int = 0
    pinned_bytes: int | None = None
    sampled: bool = False
    interval_seconds: float = 0.0
    holders: tuple[Holder, ...] = ()
    missing: str = ""

    @property
    def over_bytes(self) -> int:
        """Return by how much the peak is above the limit; 0 if it is not, or was not measured."""
        return 0 if self.peak_bytes is None else max(0, self.peak_bytes - self.limit_bytes)
