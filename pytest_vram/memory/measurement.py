"""What was measured. Sizes are whole bytes; ``None`` means that the probe does not report a figure, never 0 or -1."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pytest_vram.memory.device import Device
from pytest_vram.memory.timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The maximum of each metric over one interval. The maxima need not fall on the same moment."""

    requested_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    device_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a program asked of one device in an interval.

    A call of cuBLAS, cuDNN or NCCL counts as one kernel; a card may need several for it. A CUDA graph counts with all
    that it holds each time that it is launched. Kernels that read or write managed memory move pages, which no figure
    here includes.

    Attributes:
        launches: kernels that were launched.
        graph_launches: CUDA graphs that were launched.
        fills: ``cudaMemset`` calls.
        copies_to_device: copies from host memory to the device.
        copied_to_device_bytes: bytes of these.
        copies_to_host: copies from the device to host memory.
        copied_to_host_bytes: bytes of these.
        copies_on_device: copies within a device or between two devices.
        copied_on_device_bytes: bytes of these.
        synchronizations: how often the host waited for the device: for a stream, an event, the whole device, or a
            copy that returns only when it is done.
    """

    launches: int = 0
    graph_launches: int = 0
    fills: int = 0
    copies_to_device: int = 0
    copied_to_device_bytes: int = 0
    copies_to_host: int = 0
    copied_to_host_bytes: int = 0
    copies_on_device: int = 0
    copied_on_device_bytes: int = 0
    synchronizations: int = 0

    def __add__(self, other: Work) -> Work:
        return self._with(other, 1)

    def __sub__(self, earlier: Work) -> Work:
        return self._with(earlier, -1)

    def _with(self, other: Work, sign: int) -> Work:
        return Work(**{f.name: getattr(self, f.name) + sign * getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A named interval inside a test.

    ``start`` and ``end`` are seconds since the test's measurement began. ``work`` is None where it is not counted.
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
        ooms: OutOfMemory raised by the allocator.
        contaminated: another process's memory moved in the interval: the figure must not fail a budget.
        timeline: memory over time, where it was asked for.
        baseline_bytes: the same test's own allocated peak on such a card in the report's baseline; ``None`` where that
            has no entry.
        work: kernels, copies and waits of the test; ``None`` where they are not counted, as on a real card.
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
    work: Work | None = None

    def figure(self, metric: str) -> int | None:
        """The test's own peak in ``metric`` (``allocated``, ``reserved``, ``device``, ``requested``), in bytes."""
        peak: int | None = getattr(self.peak, f"{metric}_bytes")
        return None if peak is None else max(0, peak - self.uncounted_bytes)
