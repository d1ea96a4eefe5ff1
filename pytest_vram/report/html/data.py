"""Make the data for the page's script: JSON so compact that a thousand tests take less than 2 MB.

The data leave out the names of tests, which the script reads from the table, and empty and default values.
"""

from __future__ import annotations

import bisect
import itertools
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_vram.report.changes import between
from pytest_vram.report.host_memory import details, summary
from pytest_vram.report.html.segments import layout_data
from pytest_vram.report.likely import spread, words
from pytest_vram.report.rows import rows, work_text, worst

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_vram.memory import HostPeak, Measurement, Phase, Report, TestRecord, Timeline
    from pytest_vram.report.rows import Row

FULL = 24
"""The number of tests, worst first, with all points and holders. Later tests share the room that is left."""
CURVES_BYTES = 250_000
"""The most bytes for the curves of all other tests together."""
PAGE_BYTES, ROW_BYTES = 1_900_000, 500
"""The most bytes for the page, and for a row of its table. Drawings of segments share the rest, worst test first."""
POINTS, HOLDERS = 240, 30
_FEW_POINTS, _FEW_HOLDERS, _FEW_PHASES = 12, 4, 3
_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_STEPS = len(_DIGITS) ** 2 - 1
_SERIES = 11  # the most curves in the timeline of one test, without those of modules


class _Detail(NamedTuple):
    points: int
    holders: int
    full: bool


class Strings:
    """Stores each text once, so that the data can refer to it by its number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, text: str | None) -> int:
        """Return the number of a text; -1 for None."""
        return -1 if text is None else self._numbers.setdefault(text, len(self._numbers))

    def all(self) -> list[str]:
        """Return the texts in the order of their numbers."""
        return list(self._numbers)


def page_data(report: Report, before: Report | None = None) -> dict[str, Any]:
    """Return the data of a page, with the worst test first."""
    strings = Strings()
    tests = {test.nodeid: test for test in report.tests}
    earlier = {test.nodeid: test for test in before.tests} if before is not None else {}
    others = max(1, len(tests) - FULL)
    points = max(_FEW_POINTS, min(POINTS, CURVES_BYTES // (others * _SERIES * 2)))
    full, short = _Detail(POINTS, HOLDERS, True), _Detail(points, _FEW_HOLDERS, False)
    shown = [
        _test(row, tests[row.nodeid], earlier.get(row.nodeid), strings, full if i < FULL else short)
        for i, row in enumerate(rows(report))
    ]
    drawings = [
        (test["layout"], test["layout"].pop("segments")) for test in shown if "segments" in test.get("layout", ())
    ]
    room = PAGE_BYTES - ROW_BYTES * len(shown) - _size(shown)
    for layout, drawing in drawings:
        room -= _size(drawing)
        if room > 0:
            layout["segments"] = drawing
    baseline = None if report.baseline is None else [report.baseline.source, report.baseline.tolerance_percent]
    return {"tests": shown, "strings": strings.all(), "baseline": baseline}


def pack(values: Sequence[int], top: int) -> str:
    """Encode each value as two characters, in steps of ``top`` / 4095, which is finer than a screen shows."""
    steps = (max(0, min(_STEPS, round(value * _STEPS / top))) if top else 0 for value in values)
    return "".join(_DIGITS[step >> 6] + _DIGITS[step & 63] for step in steps)


def thinned(timeline: Timeline, points: int) -> list[int]:
    """Return the positions of the first and the last value, the peak, and the largest value of each interval."""
    count = len(timeline.allocated)
    if count <= points:
        return list(range(count))
    edges = [count * i // (points - 3) for i in range(points - 2)]
    largest = {max(range(a, b), key=timeline.allocated.__getitem__) for a, b in itertools.pairwise(edges)}
    return sorted(largest | {0, timeline.peak_index, count - 1})


def _test(row: Row, test: TestRecord, earlier: TestRecord | None, strings: Strings, detail: _Detail) -> dict[str, Any]:
    measurement = worst(test)[1]
    data = _figures(row, test, strings, detail)
    if measurement is not None:
        data |= _recorded(row, measurement, strings, detail)
        if len(test.measurements) > 1:
            data["index"] = str(measurement.device.index)
            data["devices"] = [_device(m) for m in test.measurements]
        data["processes"] = [
            [m.device.index, p.rank, p.pid, p.peak.allocated_bytes, p.peak.device_bytes, p.start, p.end, p.ended]
            for m in test.measurements
            for p in m.processes[: detail.holders]
        ]
        if earlier is not None:
            data["before"] = _before(worst(earlier)[1], measurement)
    return _short(data)


def _figures(row: Row, test: TestRecord, strings: Strings, detail: _Detail) -> dict[str, Any]:
    """Return what is shown of every test, measured or not."""
    return {
        "outcome": "" if row.outcome == "passed" else row.outcome,
        "verdict": "" if row.verdict == "within" else row.verdict,
        "on": None if row.device is None else [strings.number(row.kind), strings.number(row.device)],
        "metric": "" if row.metric == "allocated" else row.metric,
        "peak": row.peak_bytes,
        "fixtures": [[s.name, s.scope, s.size_bytes] for s in row.fixtures],
        "baseline": row.baseline_bytes,
        "change": row.change_bytes,
        "regressed": row.regressed,
        "budget": row.budget_bytes,
        "where": test.budget.where if test.budget else "",
        "origin": test.budget.origin if test.budget and test.budget.origin != "marker" else "",
        "figures": [row.allocated_bytes, row.reserved_bytes, row.device_bytes],
        "leaked": row.leaked_bytes,
        "retries": row.retries,
        "ooms": row.ooms,
        "recovered": row.recovered,
        "reason": row.reason,
        "notes": [[strings.number(note.name), strings.number(note.text)] for note in row.notes],
        "example": row.worst_example,
        "work": work_text(row.work),
        "likely": "" if (bounds := spread(row)) is None else words(bounds),
        "host": _host(row.host, detail),
        "reads": [
            [strings.number(r.location), strings.number(r.operation), r.count, r.answered, r.note]
            for r in row.host_reads[: detail.holders]
        ],
    }


def _recorded(row: Row, measurement: Measurement, strings: Strings, detail: _Detail) -> dict[str, Any]:
    """Return what is shown of the device on which the test needed most: holders, phases, timeline and segments."""
    timeline = measurement.timeline
    phases = row.phases if detail.full else _worst_phases(row.phases)
    data: dict[str, Any] = {
        "uncounted": measurement.uncounted_bytes,
        "holders": [
            [h.size_bytes, h.count, strings.number(h.location), strings.number(h.category), strings.number(h.module)]
            for h in measurement.holders[: detail.holders]
        ],
        "phases": [[*_phase(phase), -1, -1] for phase in phases],
        "hidden": len(row.phases) - len(phases),
    }
    if timeline is not None and timeline.allocated:
        data["timeline"] = _timeline(timeline, strings, detail)
        data["phases"] = _placed(phases, timeline, thinned(timeline, detail.points))
    if timeline is not None and timeline.layout is not None:
        data["layout"] = layout_data(timeline.layout, strings.number, full=detail.full)
    return data


def _device(found: Measurement) -> list[Any]:
    peak = found.peak
    sizes = (peak.allocated_bytes, peak.reserved_bytes, peak.device_bytes)
    return [found.device.index, found.device.name, *sizes, work_text(found.work)]


def _host(host: HostPeak | None, detail: _Detail) -> list[str]:
    """Return a summary of the host memory, and its parts for a test that is shown in full."""
    if host is None:
        return []
    parts = details(host) if detail.full and host.peak_bytes is not None else []
    return [summary(host), *(part.strip() for part in parts)]


def _size(data: Any) -> int:
    return len(json.dumps(data, ensure_ascii=False, separators=(",", ":")))


def _short(data: dict[str, Any]) -> dict[str, Any]:
    """Return the data without empty values; a change of 0 is kept, because no change means no earlier peak."""
    return {
        name: value
        for name, value in data.items()
        if value not in (None, [], "", 0) or (name == "change" and value == 0)
    }


def _timeline(timeline: Timeline, strings: Strings, detail: _Detail) -> dict[str, Any]:
    chosen = thinned(timeline, detail.points)
    top = max(max(timeline.allocated), max(timeline.reserved, default=0))

    def series(parts: Any) -> list[list[Any]]:
        return [
            [strings.number(p.name), p.sizes[timeline.peak_index], pack([p.sizes[i] for i in chosen], top)]
            for p in parts
        ]

    return {
        "top": top,
        "peak": chosen.index(timeline.peak_index),
        "most": timeline.peak_bytes,
        "seconds": [round(timeline.times[i], 4) for i in (chosen[0], chosen[-1])],
        "events": timeline.events,
        "cut": timeline.cut,
        "allocated": pack([timeline.allocated[i] for i in chosen], top),
        "reserved": pack([timeline.reserved[i] for i in chosen], top) if timeline.reserved else "",
        "categories": series(timeline.categories),
        "modules": series(timeline.modules) if detail.full else [],
    }


def _worst_phases(phases: Sequence[Phase]) -> list[Phase]:
    kept = sorted(phases, key=lambda phase: -(phase.peak.allocated_bytes or 0))[:_FEW_PHASES]
    return [phase for phase in phases if phase in kept]


def _phase(phase: Phase) -> list[Any]:
    return [phase.name, phase.peak.allocated_bytes, phase.limit_bytes, round(phase.end - phase.start, 3)]


def _placed(phases: Sequence[Phase], timeline: Timeline, chosen: Sequence[int]) -> list[list[Any]]:
    """Return phases with their first and last point, because the axis counts allocations, not seconds."""
    times = [timeline.times[i] for i in chosen]
    placed = []
    for phase in phases:
        first, last = bisect.bisect_left(times, phase.start), bisect.bisect_right(times, phase.end) - 1
        placed.append([*_phase(phase), max(0, first), max(first, last)])
    return placed


def _before(old: Measurement | None, new: Measurement) -> dict[str, Any] | None:
    """Return the changes since an earlier report by category and line, or None for another card or kind of probe."""
    changes = between(old, new)
    if old is None or changes is None:
        return None
    categories, lines = (
        [[part.name, part.before_bytes, part.after_bytes] for part in parts]
        for parts in (changes.categories, changes.lines[:15])
    )
    return {"peak": old.figure("allocated"), "categories": categories, "lines": lines}
