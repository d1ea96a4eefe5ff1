"""What was measured. Sizes are whole bytes; ``None`` means that the probe does not report a figure, never 0 or -1."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_vram.memory.device import Device
from pytest_vram.memory.note import Note
from pytest_vram.memory.peak import Peak
from pytest_vram.memory.process_peak import ProcessPeak
from pytest_vram.memory.timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A named interval inside a test; ``start`` and ``end`` are seconds since the test's measurement began."""

    name: str
    start: float
    end: float
    peak: Peak
    parent: str | None = None
    limit_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Bytes held at the peak by allocations made at one place in the user's code."""

    size_bytes: int
    count: int
    location: str
    category: str | None = None
    module: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FixtureShare:
    """What one fixture added to allocated memory when it was set up, and still counts in the test's peak."""

    name: str
    scope: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRead:
    """A place where the program read a value from a dry GPU that had computed nothing."""

    location: str
    operation: str
    count: int
    answered: bool
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One test on one device.

    Attributes:
        start_bytes: allocated bytes when the interval began: held by fixtures and by what earlier tests left.
        uncounted_bytes: held all along by fixtures that the test does not use and by what earlier tests left; part of
            the peak, and not of what is held against a budget or a baseline.
        leaked_bytes: allocated bytes left over after teardown; ``None`` when not checked.
        retries: cudaMalloc retries (cache flushed to satisfy an allocation).
        ooms: requests that the allocator refused with OutOfMemoryError. A program may catch the error and go on.
        contaminated: another process's memory moved in the interval: the figure must not fail a budget.
        timeline: memory over time, where it was asked for.
        baseline_bytes: the same test's own allocated peak on such a card in the report's baseline; ``None`` where that
            has no entry.
        notes: assumptions that the measurement rests on; empty where there are none.
        processes: the processes that used the device, where several processes were measured apart.
    """

    device: Device
    peak: Peak
    start_bytes: int = 0
    uncounted_bytes: int = 0
    phases: tuple[Phase, ...] = ()
    holders: tuple[Holder, ...] = ()
    fixtures: tuple[FixtureShare, ...] = ()
    leaked_bytes: int | None = None
    retries: int = 0
    ooms: int = 0
    host_reads: tuple[HostRead, ...] = ()
    contaminated: bool = False
    timeline: Timeline | None = None
    baseline_bytes: int | None = None
    notes: tuple[Note, ...] = ()
    processes: tuple[ProcessPeak, ...] = ()

    def figure(self, metric: str) -> int | None:
        """The test's own peak in ``metric`` (``allocated``, ``reserved``, ``device``, ``requested``), in bytes."""
        peak: int | None = getattr(self.peak, f"{metric}_bytes")
        return None if peak is None else max(0, peak - self.uncounted_bytes)
