"""A report as rows: what every rendering shows, worked out once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_vram.memory import Exceeded, Unmeasured, Within

if TYPE_CHECKING:
    from pytest_vram.memory import FixtureShare, Holder, HostRead, Kind, Phase, Report, TestRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One test, on the device on which it needed most.

    Attributes:
        peak_bytes: the test's own, in the budget's metric (allocated without a budget); ``None`` where not measured.
        fixtures_bytes: what fixtures hold of it.
        verdict: ``within``, ``exceeded``, ``unmeasured``, or ``none`` without a budget.
        used: share of the budget, 1 at the limit; ``None`` without budget or figure.
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
    fixtures: tuple[FixtureShare, ...]
    phases: tuple[Phase, ...]
    holders: tuple[Holder, ...]
    host_reads: tuple[HostRead, ...]
    worst_example: str | None


def rows(report: Report) -> list[Row]:
    """Every test, worst first: broken budgets, then by peak."""
    found = [row(test) for test in report.tests]
    return sorted(found, key=lambda r: (r.verdict != "exceeded", -(r.peak_bytes or -1), r.nodeid))


def row(test: TestRecord) -> Row:
    """One test as a row."""
    metric = test.budget.metric if test.budget else "allocated"
    measurement = max(test.measurements, key=lambda m: m.figure(metric) or -1, default=None)
    limit = test.budget.limit_bytes if test.budget else None
    peak = measurement.figure(metric) if measurement else None
    if limit is not None and isinstance(test.verdict, Exceeded):
        peak = limit + test.verdict.over_bytes
    elif limit is not None and isinstance(test.verdict, Within):
        peak = limit - test.verdict.headroom_bytes
    verdict = "none" if test.verdict is None else type(test.verdict).__name__.lower()
    fixtures = measurement.fixtures if measurement else ()
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
        used=None if limit is None or peak is None or verdict == "unmeasured" else peak / limit,
        verdict=verdict,
        reason=test.verdict.reason if isinstance(test.verdict, Unmeasured) else "",
        leaked_bytes=measurement.leaked_bytes if measurement else None,
        retries=measurement.retries if measurement else 0,
        ooms=measurement.ooms if measurement else 0,
        fixtures=fixtures,
        phases=measurement.phases if measurement else (),
        holders=measurement.holders if measurement else (),
        host_reads=measurement.host_reads if measurement else (),
        worst_example=test.worst_example,
    )
