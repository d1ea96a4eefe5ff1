"""Render the tables below the table of tests (fixtures, leaks, segments, host reads), and details without a script."""

from __future__ import annotations

import html
from collections import Counter
from typing import TYPE_CHECKING

from pytest_vram.memory import without_size
from pytest_vram.report.html.segments import segment_rows
from pytest_vram.report.likely import spread
from pytest_vram.report.rows import refusals_text, uneven_text
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from pytest_vram.memory import Report
    from pytest_vram.report.html.segments import SegmentRow
    from pytest_vram.report.rows import Row

_MOST = 50
"""The most rows of one table."""
_WITHOUT_SCRIPT = 5
"""The number of tests, worst first, whose holders and segments are shown without JavaScript."""
_HOLDERS = 10

Cells = list[str]


def text(value: object) -> str:
    """Return a value as text, escaped for HTML."""
    return html.escape(str(value), quote=True)


def tables_below(report: Report, before: Report | None, table: list[Row]) -> list[str]:
    """Return the tables below the table of tests, without empty ones."""
    parts = [
        _gone(report, before),
        _ranks(table),
        _leaks(table),
        _unused(table),
        _bill(table),
        _processes(report),
        _noted(table),
        _likely(table),
        _reads(table),
    ]
    return [part for part in [*parts, _without_script(report, table)] if part]


def _processes(report: Report) -> str:
    """Render the processes of measurements that list them, by device."""
    body = [
        [
            str(m.device.index),
            "" if p.rank is None else str(p.rank),
            str(p.pid),
            format_bytes(p.peak.allocated_bytes),
            format_bytes(p.peak.device_bytes),
            p.ended,
        ]
        for test in report.tests
        for m in test.measurements
        for p in m.processes
    ]
    heads = [("device", "n"), ("rank", "n"), ("PID", "n"), ("allocated", "n"), ("on the device", "n"), ("ended", "l")]
    return _side("Processes", heads, body)


def _noted(table: list[Row]) -> str:
    """Render the assumptions behind the figures, and the tests that ran out of memory."""
    tests = Counter(without_size(note) for row in table for note in row.notes)
    body = [[note.name, note.text, f"{count:,}"] for note, count in tests.items()]
    body += [["the card was full", f"{row.nodeid}: {refusals_text(row)}", "1"] for row in table if row.ooms]
    return _side("What the figures rest on", [("name", "l"), ("", "l"), ("tests", "n")], body, opened=True)


def _likely(table: list[Row]) -> str:
    """Render the peaks that rest on a guess, with their bounds."""
    body = []
    for row in table:
        if (found := spread(row)) is not None:
            straddles = row.budget_bytes is not None and found.straddles(row.budget_bytes)
            sizes = (found.low, found.expected, found.high)
            verdict = "only likely" if straddles else ""
            body.append([row.nodeid, *(format_bytes(size) for size in sizes), found.basis, verdict])
    heads = [("test", "l"), ("low", "n"), ("expected", "n"), ("high", "n"), ("bounds", ""), ("verdict", "")]
    return _side("Peaks that rest on a guess", heads, body, opened=True)


def _side(title: str, heads: list[tuple[str, str]], body: list[Cells], *, opened: bool = False, note: str = "") -> str:
    """Render a collapsible table; ``heads`` are titles with their CSS class (``n`` for numbers)."""
    if not body:
        return ""
    return (
        f"<details{' open' if opened else ''}><summary>{text(title)} <span>{len(body)}</span></summary>"
        f"{f'<p>{text(note)}</p>' if note else ''}{_table(heads, body[:_MOST])}{_more(len(body) - _MOST)}</details>"
    )


def _table(heads: list[tuple[str, str]], body: list[Cells]) -> str:
    head = "".join(f'<th class="{style}">{text(word)}</th>' for word, style in heads)
    lines = "".join(f"<tr>{_cells(heads, cells)}</tr>" for cells in body)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cells(heads: list[tuple[str, str]], cells: Cells) -> str:
    """Render a row.

    A narrow screen shows no head. There a cell of class ``l`` has a line to itself, and the others are shown with the
    title of their column.
    """
    titles = ("" if style == "l" else f' data-head="{text(word)}"' for word, style in heads)
    return "".join(
        f'<td class="{style}"{title}>{text(cell)}</td>'
        for (_, style), title, cell in zip(heads, titles, cells, strict=True)
    )


def _more(count: int, size: int | None = None) -> str:
    return f"<p>and {count} more{'' if size is None else f', {format_bytes(size)}'}</p>" if count > 0 else ""


def _bill(table: list[Row]) -> str:
    sizes: dict[tuple[str, str], list[int]] = {}
    for row in table:
        for share in row.fixtures:
            sizes.setdefault((share.name, share.scope), []).append(share.size_bytes)
    found = sorted(sizes.items(), key=lambda item: (-max(item[1]), item[0]))
    body = [[name, scope, str(len(held)), format_bytes(max(held))] for (name, scope), held in found]
    return _side("What fixtures hold", [("fixture", "l"), ("scope", ""), ("tests", "n"), ("holds", "n")], body)


def _ranks(table: list[Row]) -> str:
    body = [
        [
            row.nodeid,
            rank.title,
            "" if rank.card is None else str(rank.card),
            format_bytes(rank.peak_bytes),
            "" if row.imbalance is None or index else uneven_text(row.imbalance),
            rank.missing or ("" if rank.left_bytes is None else f"still holds {format_bytes(rank.left_bytes)}"),
        ]
        for row in table
        for index, rank in enumerate(row.ranks)
    ]
    heads = [("test", "l"), ("process", "l"), ("card", "n"), ("peak", "n"), ("imbalance", ""), ("note", "l")]
    return _side("Processes below the tests, the largest first", heads, body, opened=True)


def _leaks(table: list[Row]) -> str:
    leaking = sorted((row for row in table if row.leaked_bytes), key=lambda row: -(row.leaked_bytes or 0))
    body = [[row.nodeid, format_bytes(row.leaked_bytes)] for row in leaking]
    return _side("Left behind by tests", [("test", "l"), ("left behind", "n")], body, opened=True)


def _unused(table: list[Row]) -> str:
    known = sorted((row for row in table if row.unused_bytes), key=lambda row: -(row.fragmented_bytes or 0))
    body = [
        [row.nodeid, *(format_bytes(s) for s in (row.unused_bytes, row.fragmented_bytes, row.largest_free_bytes))]
        for row in known
    ]
    heads = [("test", "l"), ("not in use", "n"), ("lost to fragmentation", "n"), ("largest free block", "n")]
    note = (
        "At the moment of the allocated peak. The allocator gives empty segments back before it runs out of memory."
        " Memory between blocks in use is lost to requests that are too large for it."
    )
    return _side("Reserved, and not in use", heads, body, note=note)


def _reads(table: list[Row]) -> str:
    counts: Counter[tuple[str, str, str]] = Counter()
    for row in table:
        for read in row.host_reads:
            counts[read.location, read.operation, "answered" if read.answered else "a guess"] += read.count
    body = [[*place, f"{count:,}"] for place, count in counts.most_common()]
    heads = [("line", "l"), ("operation", ""), ("value", ""), ("times", "n")]
    return _side("Values read back from the dry GPU", heads, body)


def _gone(report: Report, before: Report | None) -> str:
    """Render the tests that were measured in the earlier run and not in this one."""
    if before is None:
        return ""
    old, new = _allocated_peaks(before), _allocated_peaks(report)
    body = [[name, format_bytes(peak)] for name, peak in sorted(old.items()) if peak and name not in new]
    return _side("Gone since the earlier run", [("test", "l"), ("peak then", "n")], body)


def _allocated_peaks(report: Report) -> dict[str, int]:
    """Return the largest allocated peak of each measured test, in bytes, by node id."""
    found: dict[str, int] = {}
    for test in report.tests:
        for measurement in test.measurements:
            if (peak := measurement.figure("allocated")) is not None:
                found[test.nodeid] = max(found.get(test.nodeid, 0), peak)
    return found


def _without_script(report: Report, table: list[Row]) -> str:
    """Render tables of the worst tests' holders and segments, for browsers without JavaScript."""
    tests = {test.nodeid: test for test in report.tests}
    parts: list[str] = []
    for row in table:
        if not row.holders or len(parts) == _WITHOUT_SCRIPT:
            continue
        holders = [
            [format_bytes(h.size_bytes), f"{h.count:,}", h.category or "", h.module or "", h.location]
            for h in row.holders[:_HOLDERS]
        ]
        heads = [("bytes", "n"), ("blocks", "n"), ("category", ""), ("module", ""), ("line", "l")]
        part = f"<h2>{text(row.nodeid)}</h2><h3>Who holds the peak</h3>{_table(heads, holders)}"
        part += _more(len(row.holders) - _HOLDERS)
        layouts = [m.timeline.layout for m in tests[row.nodeid].measurements if m.timeline and m.timeline.layout]
        if layouts:
            layout = max(layouts, key=lambda found: found.reserved_bytes)
            rows, count, size = segment_rows(layout)
            body = [_segment(found) for found in rows]
            names = ["in use", "waiting", "free", "largest free"]
            heads = [("pool", ""), ("segment", "n"), ("number", "n"), *((name, "n") for name in names), ("line", "l")]
            part += f"<h3>Segments at the peak</h3>{_table(heads, body)}{_more(count, size)}"
        parts.append(part)
    return f"<noscript>{''.join(parts)}</noscript>" if parts else ""


def _segment(row: SegmentRow) -> Cells:
    sizes = (row.active_bytes, row.pending_bytes, row.free_bytes, row.largest_free_bytes)
    shown = (format_bytes(size) if size else "" for size in sizes)
    return [row.pool, format_bytes(row.size_bytes), f"{row.count:,}", *shown, row.location or ""]
