"""Convert a report to rows: the figures that every format shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_vram.memory import Exceeded, Unmeasured, Within, merged
from pytest_vram.memory.process import cards_of, imbalance
from pytest_vram.memory.report import grew
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from pytest_vram.memory import (
        FixtureShare,
        Holder,
        HostPeak,
        HostRead,
        Kind,
        Measurement,
        Note,
        Phase,
        Report,
        TestRecord,
        Work,
    )
    from pytest_vram.memory.process import CardNeed


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRow:
    """One child process of a test, on the device on which it needed most.

    Attributes:
        title: its rank or its command line, and its process id.
        rank: its rank in ``torch.distributed``; ``None`` if it has none.
        pid: its process id.
        card: the index of the device; ``None`` if there are no figures, and for CPU tensors.
        peak_bytes: its peak in the test's metric; ``None`` if it was not measured.
        missing: why there are no figures.
        left_bytes: the bytes that it still held after the test.
    """

    title: str
    rank: int | None
    pid: int
    card: int | None
    peak_bytes: int | None
    allocated_bytes: int | None
    reserved_bytes: int | None
    device_bytes: int | None
    missing: str
    left_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One test, with its figures on the device on which it needed most.

    Attributes:
        peak_bytes: the test's own peak in ``metric``; ``None`` if it was not measured.
        fixtures_bytes: the part of the peak that fixtures hold.
        verdict: ``within``, ``exceeded``, ``unmeasured``, or ``none`` without a budget.
        used: the peak as a share of the budget, 1 at the limit; ``None`` without a budget or a peak.
        baseline_bytes: the allocated peak in the report's baseline; ``None`` if the baseline has no entry.
        change_bytes: growth since the baseline, negative if the peak shrank; ``None`` without an entry.
        regressed: whether the peak grew by more than the baseline's tolerance.
        unused_bytes: the bytes that were reserved but not allocated at the allocated peak. This and the next two
            figures are ``None`` if the segments were not recorded.
        fragmented_bytes: the part of the unused bytes that lies free between blocks in use.
        largest_free_bytes: the largest free block of the unused bytes.
        ooms: the number of requests that the allocator refused with OutOfMemoryError, on all devices.
        recovered: whether the test passed despite such errors, because it caught them and went on with less.
        assumptions: the names of the notes, in one text.
        notes: the assumptions that the figures rest on, of every device.
        host_bytes: the peak of host memory; ``None`` if the test has no budget for it, or it was not measured.
        host_budget_bytes: the budget of host memory.
        host_pinned_bytes: the peak of pinned host memory.
        host: the peak of host memory with its parts.
        rank_count: the number of child processes of the test that used a GPU.
        imbalance: how much more than the mean the largest of them needs: 0.25 is 25%; ``None`` for fewer than two.
        ranks: these processes, the one that needs most first.
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
    recovered: bool
    baseline_bytes: int | None
    change_bytes: int | None
    regressed: bool
    unused_bytes: int | None
    fragmented_bytes: int | None
    largest_free_bytes: int | None
    assumptions: str
    host_bytes: int | None
    host_budget_bytes: int | None
    host_pinned_bytes: int | None
    host: HostPeak | None
    rank_count: int
    imbalance: float | None
    ranks: tuple[RankRow, ...]
    fixtures: tuple[FixtureShare, ...]
    phases: tuple[Phase, ...]
    holders: tuple[Holder, ...]
    host_reads: tuple[HostRead, ...]
    notes: tuple[Note, ...]
    work: Work | None
    worst_example: str | None


def rows(report: Report) -> list[Row]:
    """Return a row for every test: tests over their budget first, then in the order of their peaks."""
    tolerance = report.baseline.tolerance_percent if report.baseline else 0
    found = [row(test, tolerance) for test in report.tests]
    return sorted(found, key=lambda r: (r.verdict != "exceeded", -(r.peak_bytes or -1), r.nodeid))


def worst(test: TestRecord) -> tuple[str, Measurement | None]:
    """Return the metric that is shown for a test, and the measurement of the device on which it needed most.

    The metric is that of the budget. Without a budget it is ``allocated``, or ``device`` if that is all that the probe
    reports.
    """
    known = any(m.peak.allocated_bytes is not None for m in test.measurements) or not test.measurements
    metric = test.budget.metric if test.budget else "allocated" if known else "device"
    card = _fullest(test, metric)
    return metric, card.worst if card is not None else None


def rank_rows(test: TestRecord, metric: str) -> tuple[RankRow, ...]:
    """Return a row for each child process of a test, the one that needs most first."""
    found = []
    for process in test.processes:
        most = max(process.measurements, key=lambda m: m.figure(metric) or -1, default=None)
        found.append(
            RankRow(
                title=process.title,
                rank=process.rank,
                pid=process.pid,
                card=most.device.index if most and most.device.kind != "host" else None,
                peak_bytes=most.figure(metric) if most else None,
                allocated_bytes=most.peak.allocated_bytes if most else None,
                reserved_bytes=most.peak.reserved_bytes if most else None,
                device_bytes=most.peak.device_bytes if most else None,
                missing=process.missing,
                left_bytes=process.left_bytes if process.left else None,
            )
        )
    return tuple(sorted(found, key=lambda row: (-(row.peak_bytes or -1), row.rank or 0, row.pid)))


def _fullest(test: TestRecord, metric: str) -> CardNeed | None:
    """Return the card that held most, counting all processes of the test; None without measurements.

    The allocators of ranks often reserve the same amount. Of cards that held the same, the result is the one with the
    most bytes in live tensors.
    """
    each = test.budget is not None and test.budget.ranks == "each"
    found = cards_of(test.measurements, test.processes, metric, each=each)

    def held(card: CardNeed) -> tuple[int, int]:
        return -1 if card.size_bytes is None else card.size_bytes, card.worst.peak.allocated_bytes or 0

    return max(found, key=held, default=None)


def _peak(test: TestRecord, metric: str) -> int | None:
    """Return the peak that the verdict is about; without one, that of the card that held most."""
    limit = test.budget.limit_bytes if test.budget else None
    if limit is not None and isinstance(test.verdict, Exceeded):
        return limit + test.verdict.over_bytes
    if limit is not None and isinstance(test.verdict, Within):
        return limit - test.verdict.headroom_bytes
    fullest = _fullest(test, metric)
    return fullest.size_bytes if fullest else None


def row(test: TestRecord, tolerance_percent: float = 0) -> Row:
    """Return the row of one test; growth of at most ``tolerance_percent`` is not a regression."""
    metric, measurement = worst(test)
    limit = test.budget.limit_bytes if test.budget else None
    peak = _peak(test, metric)
    ranks = rank_rows(test, metric)
    verdict = "none" if test.verdict is None else type(test.verdict).__name__.lower()
    fixtures = measurement.fixtures if measurement else ()
    before = measurement.baseline_bytes if measurement else None
    allocated = _fullest(test, "allocated")
    now = allocated.size_bytes if allocated else None
    layout = measurement.timeline.layout if measurement and measurement.timeline else None
    notes = merged(note for m in test.measurements for note in m.notes)
    ooms = sum(m.ooms for m in test.measurements)
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
        ooms=ooms,
        recovered=ooms > 0 and test.outcome == "passed",
        baseline_bytes=before,
        change_bytes=None if before is None or now is None else now - before,
        regressed=before is not None and now is not None and grew(before, now, tolerance_percent),
        unused_bytes=layout.unused_bytes if layout else None,
        fragmented_bytes=layout.fragmented_bytes if layout else None,
        largest_free_bytes=layout.largest_free_bytes if layout else None,
        assumptions="; ".join(note.name for note in notes),
        host_bytes=test.host.peak_bytes if test.host else None,
        host_budget_bytes=test.host.limit_bytes if test.host else None,
        host_pinned_bytes=test.host.pinned_bytes if test.host else None,
        host=test.host,
        rank_count=len(ranks),
        imbalance=imbalance([rank.peak_bytes for rank in ranks if rank.peak_bytes is not None]),
        ranks=ranks,
        fixtures=fixtures,
        phases=measurement.phases if measurement else (),
        holders=measurement.holders if measurement else (),
        host_reads=tuple(read for m in test.measurements for read in m.host_reads),
        notes=notes,
        work=measurement.work if measurement else None,
        worst_example=test.worst_example,
    )


def refusals_text(row: Row) -> str:
    """Return the test's out-of-memory errors as text; ``""`` if there were none."""
    if not row.ooms:
        return ""
    errors = f"{row.ooms} out-of-memory error{'s' if row.ooms > 1 else ''}"
    return f"{errors}, caught by the test, which went on with less" if row.recovered else errors


def uneven_text(value: float) -> str:
    """Return a text such as ``the largest needs 25.0% more than the mean``."""
    return f"the largest needs {value:.1%} more than the mean"


def work_text(work: Work | None) -> str:
    """Return a text such as ``1,204 kernels, 2 waits, 8 KiB to the device in 2 copies, 4 bytes to the host in 1 copy``.

    It is empty if the work was not counted.
    """
    if work is None:
        return ""
    parts = [f"{work.launches:,} kernel{'s' * (work.launches != 1)}"]
    parts.append(f"{work.synchronizations:,} wait{'s' * (work.synchronizations != 1)}")
    for count, size, where in (
        (work.copies_to_device, work.copied_to_device_bytes, "to the device"),
        (work.copies_to_host, work.copied_to_host_bytes, "to the host"),
        (work.copies_on_device, work.copied_on_device_bytes, "on the device"),
    ):
        if count:
            parts.append(f"{format_bytes(size)} {where} in {count:,} cop{'y' if count == 1 else 'ies'}")
    return ", ".join(parts)


def row_change(row: Row) -> str:
    """Return the change of a test's peak since the baseline, as text; ``""`` if there is none to tell.

    A baseline has no entry for a test that needs no memory, so such a test is not new.
    """
    told = row.peak_bytes is not None and (row.change_bytes is not None or row.allocated_bytes)
    return change_text(row.change_bytes) if told else ""


def change_text(size: int | None) -> str:
    """Return a change such as ``+1.20 GiB``, ``−88.3 MiB`` or ``none``; ``new`` without an entry in the baseline."""
    if size is None:
        return "new"
    return f"{'+' if size > 0 else ''}{format_bytes(size)}".replace("-", "−") if size else "none"
