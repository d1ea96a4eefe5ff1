"""Render the table at the end of a session."""

from __future__ import annotations

import unicodedata
from collections import Counter
from typing import TYPE_CHECKING

from pytest_vram.memory import without_size
from pytest_vram.report import likely
from pytest_vram.report.host_memory import terminal_lines
from pytest_vram.report.rows import Row, refusals_text, row_change, rows, uneven_text, work_text
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from pytest_vram.memory import Note, Phase, Report

_BAR = 10
_COLORS = {"exceeded": "31", "unmeasured": "33", "within": "32", "none": "0"}
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_QUIET_ROWS = 10
_RANKS = 8  # the most processes of one test that are shown


def render(report: Report, *, width: int = 80, color: bool = False, verbosity: int = 0, top: int = 5) -> str:
    """Return the table, with the worst test first: peak, part of the fixtures, budget, used share and kind of probe.

    Args:
        report: the report to show.
        width: columns of the terminal; long names are shortened in the middle to fit.
        color: whether to use terminal colours.
        verbosity: pytest's verbosity: below 0, only the ten worst rows are shown; from 1 on, phases and work too.
        top: the number of host reads to show, and of tests to name for each assumption.
    """
    table = rows(report)
    hidden = max(0, len(table) - _QUIET_ROWS) if verbosity < 0 else 0
    shown = table[: len(table) - hidden]
    changes = report.baseline is not None
    lines = [*_header(report), *_table(shown, width, color, phases=verbosity >= 1, changes=changes)]
    if hidden:
        lines.append(f"and {hidden} more")
    lines += terminal_lines(table, top)
    lines += _refusals(table, top)
    lines += _host_reads(table, top)
    lines += _notes(table, top)
    lines += _likely(table, top)
    return "\n".join(lines)


def display_width(text: str) -> int:
    """Return the number of columns that a text takes: two for a wide character, none for a combining one."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shorten(text: str, width: int) -> str:
    """Shorten a text in the middle to at most ``width`` columns, so that the file and the parameters remain."""
    if display_width(text) <= width:
        return text
    if width < 3:
        return text[: max(0, width)]
    head = _take(text, (width - 1) // 3)
    tail = _take(text[::-1], width - 1 - display_width(head))[::-1]
    return f"{head}…{tail}"


def bar(used: float | None, width: int = _BAR) -> str:
    """Return a bar that shows the used share of the budget, in eighths of a column."""
    if used is None:
        return " " * width
    eighths = round(min(1.0, max(0.0, used)) * width * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[part] if part else "")).ljust(width)


def _header(report: Report) -> list[str]:
    names = Counter(f"{d.name} ({d.kind})" for d in report.environment.devices)
    devices = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in names.items())
    versions = f"torch {report.environment.torch}" if report.environment.torch else "no torch"
    return [f"{devices or 'no device'}; {versions}"]


def _table(shown: list[Row], width: int, color: bool, *, phases: bool, changes: bool) -> list[str]:
    fixtures = any(row.fixtures_bytes for row in shown)
    budgets = any(row.budget_bytes is not None for row in shown)
    kinds = len({row.kind for row in shown}) > 1
    titles = [
        "peak",
        *(["change"] if changes else []),
        *(["fixtures"] if fixtures else []),
        *(["budget", "used"] if budgets else []),
    ]
    room_for_bar = budgets and width >= 76
    sizes = [10, *([10] if changes else []), *([10] if fixtures else []), *([10, 5] if budgets else [])]
    fixed = sum(sizes) + len(sizes) + (_BAR + 1 if room_for_bar else 0) + (7 if kinds else 0)
    name_width = max(12, min(max((display_width(r.nodeid) for r in shown), default=12), width - fixed - 1))
    head = "".join(f"{title:>{size}} " for title, size in zip(titles, sizes, strict=True))
    head += " " * (_BAR + 1) if room_for_bar else ""
    head += f"{'kind':<6} " if kinds else ""
    lines = [(head + "test")[:width].rstrip()]
    for row in shown:
        cells = [_size(row.peak_bytes)]
        cells += [row_change(row)] if changes else []
        cells += [_size(row.fixtures_bytes) if row.fixtures_bytes else ""] if fixtures else []
        cells += [_size(row.budget_bytes) if row.budget_bytes is not None else "", _percent(row)] if budgets else []
        text = "".join(f"{cell:>{size}} " for cell, size in zip(cells, sizes, strict=True))
        text += f"{bar(row.used)} " if room_for_bar else ""
        text += f"{row.kind or '':<6} " if kinds else ""
        text += shorten(row.nodeid, name_width)
        lines.append(_painted(text.rstrip(), row, color))
        if phases and row.work is not None:
            lines.append(shorten(f"{'':>10}   asked of the device: {work_text(row.work)}", width))
        if phases:
            lines += [f"{_size(p.peak.allocated_bytes):>10}   phase {p.name}{_asked(p)}"[:width] for p in row.phases]
        lines += _ranks(row, width, everything=phases)
    return lines


def _ranks(row: Row, width: int, *, everything: bool) -> list[str]:
    """Return a line for each child process of a test, the one that needs most first, and one for their imbalance."""
    shown = row.ranks if everything else row.ranks[:_RANKS]
    lines = [
        shorten(f"{_size(r.peak_bytes):>10}   {r.title}{'' if r.card is None else f' on cuda:{r.card}'}", width)
        for r in shown
    ]
    if len(row.ranks) > len(shown):
        lines.append(f"{'':>10}   and {len(row.ranks) - len(shown)} more processes (-v shows all)")
    if row.imbalance is not None:
        lines.append(f"{'':>10}   {uneven_text(row.imbalance)} of the {len(row.ranks)} processes")
    return lines


def _asked(phase: Phase) -> str:
    text = work_text(phase.work)
    return f": {text}" if text else ""


def _host_reads(table: list[Row], top: int) -> list[str]:
    """List the host reads after which the figures rest on a guess."""
    counts: Counter[str] = Counter()
    for row in table:
        for read in row.host_reads:
            if not read.answered:
                counts[f"{read.location} ({read.operation})"] += read.count
    if not counts:
        return []
    lines = ["values read back that nothing computed (figures after them rest on a guess):"]
    lines += [f"  {count:>5} x {place}" for place, count in counts.most_common(top)]
    return lines + ([f"  and {len(counts) - top} more places"] if len(counts) > top else [])


def _refusals(table: list[Row], top: int) -> list[str]:
    """List the tests that ran out of memory, and whether they passed."""
    found = [f"  {row.nodeid}: {refusals_text(row)}" for row in table if row.ooms]
    if not found:
        return []
    lines = ["the card was full:", *found[:top]]
    return lines + ([f"  and {len(found) - top} more tests"] if len(found) > top else [])


def _notes(table: list[Row], top: int) -> list[str]:
    """List every assumption, with the worst of the tests that rest on it."""
    tests: dict[Note, list[str]] = {}
    for row in table:
        for note in row.notes:
            tests.setdefault(without_size(note), []).append(row.nodeid)
    if not tests:
        return []
    lines = ["notes on these figures:"]
    for note, names in tests.items():
        more = f" and {len(names) - top} more" if len(names) > top else ""
        lines += [f"  {note.name}: {note.text}", f"    in {', '.join(names[:top])}{more}"]
    return lines


def _likely(table: list[Row], top: int) -> list[str]:
    """List the tests whose peaks rest on a guess, passed ones too, with the bounds of these peaks."""
    found = [f"  {nodeid}: {words}" for nodeid, words in likely.lines(table)]
    if not found:
        return []
    return [likely.TITLE, *found[:top]] + ([f"  and {len(found) - top} more tests"] if len(found) > top else [])


def _size(size: int | None) -> str:
    return "n/a" if size is None else format_bytes(size)


def _percent(row: Row) -> str:
    return (
        "?"
        if row.verdict == "unmeasured"
        else ""
        if row.used is None
        else f"{row.used * 100:.0f}%"
        if row.used < 10
        else ">999%"
    )


def _painted(text: str, row: Row, color: bool) -> str:
    kind = "exceeded" if row.outcome == "failed" else row.verdict
    return f"\x1b[{_COLORS[kind]}m{text}\x1b[0m" if color and kind != "none" else text


def _take(text: str, width: int) -> str:
    taken, used = "", 0
    for character in text:
        used += display_width(character)
        if used > width:
            break
        taken += character
    return taken
