"""A report as rows: what every rendering shows, worked out once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_vram.memory import Exceeded, Unmeasured, Within
from pytest_vram.memory.report import grew
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from pytest_vram.memory import FixtureShare, Holder, HostRead, Kind, Measurement, Phase, Report, TestRecord, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One test, on the device on which it needed most.

    Attributes:
        peak_bytes: the test's own, in the metric of :func:`worst`; ``None`` where not measured.
        fixtures_bytes: what fixtures hold of it.
        verdict: ``within``, ``exceeded``, ``unmeasured``, or ``none`` without a budget.
        used: share of the budget, 1 at the limit; ``None`` without budget or figure.
        baseline_bytes: the allocated peak in the report's baseline; ``None`` where that has no entry.
        change_bytes: growth since, negative where it shrank; ``None`` without an entry.
        regressed: whether it grew by more than the baseline's tolerance.
        unused_bytes: reserved and not allocated, at the allocated peak; ``None`` where the segments were not recorded,
            as for the next two.
        fragmented_bytes: the part of it that lies free between blocks in use.
        largest_free_bytes: the largest free block of it.
    """

    nodeid: str
    outcome: str
    kind: Kind | None
    device: str | None
    metric: str
    peak_bytes: int | None
    allocated_bytes: int | None
    reserved_bytes: int | None
    device_bytes: int | None
    fixtures_bytes: int
    budget_bytes: int | None
    used: float | None
    verdict: str
    reason: str
    leaked_bytes: int | None
    retries: int
    ooms: int
    baseline_bytes: int | None
    change_bytes: int | None
    regressed: bool
    unused_bytes: int | None
    fragmented_bytes: int | None
    largest_free_bytes: int | None
    fixtures: tuple[FixtureShare, ...]
    phases: tuple[Phase, ...]
    holders: tuple[Holder, ...]
    host_reads: tuple[HostRead, ...]
    work: Work | None
    worst_example: str | None


def rows(report: Report) -> list[Row]:
    """Every test, worst first: broken budgets, then by peak."""
    tolerance = report.baseline.tolerance_percent if report.baseline else 0
    found = [row(test, tolerance) for test in report.tests]
    return sorted(found, key=lambda r: (r.verdict != "exceeded", -(r.peak_bytes or -1), r.nodeid))


def worst(test: TestRecord) -> tuple[str, Measurement | None]:
    """The metric that a test is shown in, and the measurement on the device on which it needed most.

    The metric is its budget's; without one allocated memory, or the device's where the probe knows no other.
    """
    known = any(m.peak.allocated_bytes is not None for m in test.measurements) or not test.measurements
    metric = test.budget.metric if test.budget else "allocated" if known else "device"
    return metric, max(test.measurements, key=lambda m: m.figure(metric) or -1, default=None)


def row(test: TestRecord, tolerance_percent: float = 0) -> Row:
    """One test as a row; growth over its baseline up to the tolerance is none."""
    metric, measurement = worst(test)
    limit = test.budget.limit_bytes if test.budget else None
    peak = measurement.figure(metric) if measurement else None
    if limit is not None and isinstance(test.verdict, Exceeded):
        peak = limit + test.verdict.over_bytes
    elif limit is not None and isinstance(test.verdict, Within):
        peak = limit - test.verdict.headroom_bytes
    verdict = "none" if test.verdict is None else type(test.verdict).__name__.lower()
    fixtures = measurement.fixtures if measurement else ()
    before = measurement.baseline_bytes if measurement else None
    now = measurement.figure("allocated") if measurement else None
    layout = measurement.timeline.layout if measurement and measurement.timeline else None
    return Row(
        nodeid=test.nodeid,
        outcome=test.outcome,
        kind=measurement.device.kind if measurement else None,
        device=measurement.device.name if measurement else None,
        metric=metric,
        peak_bytes=peak,
        allocated_bytes=measurement.peak.allocated_bytes if measurement else None,
        reserved_bytes=measurement.peak.reserved_bytes if measurement else None,
        device_bytes=measurement.peak.device_bytes if measurement else None,
        fixtures_bytes=sum(share.size_bytes for share in fixtures),
        budget_bytes=limit,
        used=peak / limit if limit and peak is not None and verdict != "unmeasured" else None,
        verdict=verdict,
        reason=test.verdict.reason if isinstance(test.verdict, Unmeasured) else "",
        leaked_bytes=measurement.leaked_bytes if measurement else None,
        retries=measurement.retries if measurement else 0,
        ooms=measurement.ooms if measurement else 0,
        baseline_bytes=before,
        change_bytes=None if before is None or now is None else now - before,
        regressed=before is not None and now is not None and grew(before, now, tolerance_percent),
        unused_bytes=layout.unused_bytes if layout else None,
        fragmented_bytes=layout.fragmented_bytes if layout else None,
        largest_free_bytes=layout.largest_free_bytes if layout else None,
        fixtures=fixtures,
        phases=measurement.phases if measurement else (),
        holders=measurement.holders if measurement else (),
        host_reads=measurement.host_reads if measurement else (),
        work=measurement.work if measurement else None,
        worst_example=test.worst_example,
    )


def work_text(work: Work | None) -> str:
    """``1,204 kernels, 2 waits, 8 KiB to the device, 4 bytes to the host``; empty where nothing is counted."""
    if work is None:
        return ""
    parts = [f"{work.launches:,} kernel{'s' * (work.launches != 1)}"]
    parts.append(f"{work.synchronizations:,} wait{'s' * (work.synchronizations != 1)}")
    for size, where in ((work.copied_to_device_bytes, "device"), (work.copied_to_host_bytes, "host")):
        if size:
            parts.append(f"{format_bytes(size)} to the {where}")
    return ", ".join(parts)


def change_text(size: int | None) -> str:
    """``+1.20 GiB``, ``−88.3 MiB``, ``none``; ``new`` without an entry in the baseline."""
    if size is None:
        return "new"
    return f"{'+' if size > 0 else ''}{format_bytes(size)}".replace("-", "−") if size else "none"
