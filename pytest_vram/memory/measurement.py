"""The results of measuring a test. Sizes are whole bytes; ``None`` means that the probe does not report a figure."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_vram.memory.device import Device
from pytest_vram.memory.note import Note
from pytest_vram.memory.peak import Peak
from pytest_vram.memory.process_peak import ProcessPeak
from pytest_vram.memory.timeline import Timeline
from pytest_vram.memory.work import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A named interval inside a test.

    ``start`` and ``end`` are seconds since the test's measurement began. ``work`` is ``None`` if it is not counted.
    """

    name: str
    start: float
    end: float
    peak: Peak
    parent: str | None = None
    limit_bytes: int | None = None
    work: Work | None = None


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
    """The bytes that one fixture allocated during its setup. They are part of the test's peak."""

    name: str
    scope: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRead:
    """A place where the program read a value back from a dry GPU.

    ``answered`` is false if nothing had computed the value, so that the program read zeros. ``note`` names the
    assumption that the value rests on, if any.
    """

    location: str
    operation: str
    count: int
    answered: bool
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One test on one device.

    Attributes:
        start_bytes: allocated bytes when the interval began, held by fixtures or left by earlier tests.
        uncounted_bytes: bytes held during the whole interval by fixtures that the test does not use, or left by earlier
            tests. They are part of ``peak``, and are subtracted before it is compared with a budget or a baseline.
        leaked_bytes: bytes that are still allocated after teardown; ``None`` if this was not checked.
        retries: how often the allocator emptied its cache to satisfy a request.
        ooms: requests that the allocator refused with OutOfMemoryError. A program may catch the error and go on.
        contaminated: whether the memory of another process changed in the interval. Such a figure cannot fail a budget.
        timeline: memory over time; ``None`` if it was not recorded.
        baseline_bytes: the allocated peak of this test on such a card in the report's baseline; ``None`` if the
            baseline has no entry.
        notes: the assumptions that the measurement rests on.
        processes: the processes that used the device, if they were measured one by one.
        work: kernels, copies and waits of the test; ``None`` if they are not counted, as on a real card.
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
    work: Work | None = None

    def figure(self, metric: str) -> int | None:
        """Return the peak without ``uncounted_bytes``, in bytes; ``None`` if the probe does not report ``metric``.

        ``metric`` is ``allocated``, ``reserved``, ``device`` or ``requested``.
        """
        peak: int | None = getattr(self.peak, f"{metric}_bytes")
        return None if peak is None else max(0, peak - self.uncounted_bytes)
