"""Render the comment on a pull request, which tells what grew over its base by test, category and line of code."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_vram import baseline
from pytest_vram.report.changes import between
from pytest_vram.report.host_memory import summary
from pytest_vram.report.markdown import escape
from pytest_vram.report.rows import change_text, rows, worst
from pytest_vram.report.terminal import shorten
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_vram.memory import Report
    from pytest_vram.report.changes import HolderChange
    from pytest_vram.report.rows import Row

MOST_BYTES = 60_000
"""The largest comment, in bytes; GitHub refuses one of more than 65,536 characters."""
_ROWS, _DETAILS, _PARTS, _NAME = 20, 10, 8, 200
_MARKS = {"exceeded": "❌", "unmeasured": "❔"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What a comment is about.

    Attributes:
        after: the report of the change.
        before: the report of its base; ``None`` if there is none.
        base: the name of the base, such as ``main``.
        no_base: why there is no report of the base.
        tolerance: the growth in percent up to which a peak counts as unchanged.
        page: a link to the job that has the page as an artifact; ``""`` if there is none.
        name: a name that distinguishes the comments of several jobs on one pull request.
    """

    after: Report
    before: Report | None = None
    base: str = "base"
    no_base: str = ""
    tolerance: float = 2.0
    page: str = ""
    name: str = ""


def marker(name: str) -> str:
    """Return the first line of the comment, by which a later job finds it. GitHub does not display this line."""
    plain = "".join(character for character in name if character.isalnum() or character in " _./")
    return f"<!-- pytest-vram {plain}-->" if not plain else f"<!-- pytest-vram {plain} -->"


def grown(change: Comparison) -> list[baseline.Change]:
    """Return the tests that grew by more than the tolerance, the largest growth first."""
    if change.before is None:
        return []
    peaks = baseline.peaks(change.before, failed=True)
    return list(baseline.compare(change.after, peaks, change.tolerance).regressed)


def render(change: Comparison) -> str:
    """Return the comment as Markdown."""
    for details in (*range(_DETAILS, -1, -2), 0):
        text = _rendered(change, details)
        # GitHub counts characters; a text never has fewer bytes than characters.
        if len(text.encode()) <= MOST_BYTES:
            break
    return text


def _rendered(change: Comparison, details: int) -> str:
    """Return the comment, with lines and categories for at most ``details`` tests."""
    table = rows(change.after)
    larger = grown(change)
    over = [row for row in table if row.verdict == "exceeded"]
    unmeasured = [row for row in table if row.verdict == "unmeasured"]
    host = [row for row in table if row.host is not None and row.host.over_bytes]
    named = {row.nodeid for row in (*over, *host)}
    failed = [row for row in table if row.outcome == "failed" and row.nodeid not in named]
    title = f" ({escape(change.name)})" if change.name else ""
    told = [
        f"{len(found)} {words}"
        for found, words in ((over, "over budget"), (host, "over the budget of host memory"), (failed, "failed"))
        if found
    ]
    lines = [marker(change.name), f"## GPU memory{title}: {_headline(change, larger, told)}", ""]
    if change.before is None and change.no_base:
        lines += [f"There is nothing to compare with: {escape(change.no_base)}.", ""]
    lines += _table(change, larger, over, unmeasured)
    lines += _host(host)
    if failed:
        lines += ["", f"Failed: {_listed([_test(row.nodeid) for row in failed])}."]
    for one in larger[:details]:
        lines += ["", *_details(change, one)]
    if len(larger) > details:
        lines.append(f"\nThe page shows what grew in {len(larger) - details} more tests.")
    text = "\n".join([*lines, "", *_others(change)])
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _headline(change: Comparison, larger: Sequence[object], broken: Sequence[str]) -> str:
    """Return what grew and what else is wrong, in one line."""
    told = list(broken)
    if larger:
        needs = f"{len(larger)} test{'s need' if len(larger) > 1 else ' needs'}"
        told.insert(0, f"{needs} more than `{_code(change.base)}`".replace("\\|", "|"))
    if told:
        return ", ".join(told)
    if not change.after.tests:
        return "nothing was measured"
    return "nothing grew" if change.before else "all within budget"


def _table(
    change: Comparison, larger: Sequence[baseline.Change], over: Sequence[Row], unmeasured: Sequence[Row]
) -> list[str]:
    """Return a table of the tests that grew, are over their budget, or were not measured."""
    by_test = {row.nodeid: row for row in rows(change.after)}
    before = {one.nodeid: one for one in reversed(larger)}
    chosen = list(
        dict.fromkeys([*(c.nodeid for c in larger), *(r.nodeid for r in over), *(r.nodeid for r in unmeasured)])
    )
    if not chosen:
        return []
    lines = [f"| | test | `{_code(change.base)}` | here | change | budget |", "|---|---|---:|---:|---:|---:|"]
    for nodeid in chosen[:_ROWS]:
        row, one = by_test[nodeid], before.get(nodeid)
        old = format_bytes(one.before_bytes) if one else ""
        new = format_bytes(one.after_bytes if one else row.peak_bytes)
        grew = f"{change_text(one.after_bytes - one.before_bytes)} ({one.percent_text})" if one else ""
        budget = format_bytes(row.budget_bytes) if row.budget_bytes is not None else ""
        mark = _MARKS.get(row.verdict, "▲")
        lines.append(f"| {mark} | {_test(nodeid)} | {old} | {new} | {grew} | {budget} |")
    if len(chosen) > _ROWS:
        lines.append(f"\n{len(chosen) - _ROWS} more tests; the page shows all.")
    return lines


def _host(over: Sequence[Row]) -> list[str]:
    """Return the tests that are over their budget of host memory, the worst first."""
    worst_first = sorted(over, key=lambda row: -(row.host.over_bytes if row.host else 0))
    lines = [f"- {_test(row.nodeid)}: {escape(summary(row.host))}" for row in worst_first[:_PARTS] if row.host]
    more = [f"\n{len(over) - _PARTS} more tests; the page shows all."] if len(over) > _PARTS else []
    return ["", "Host memory:", "", *lines, *more] if lines else []


def _details(change: Comparison, one: baseline.Change) -> list[str]:
    tests = {test.nodeid: test for test in change.after.tests}
    earlier = {test.nodeid: test for test in change.before.tests} if change.before else {}
    new = worst(tests[one.nodeid])[1]
    changes = between(worst(earlier[one.nodeid])[1], new) if one.nodeid in earlier and new is not None else None
    more = format_bytes(one.after_bytes - one.before_bytes)
    lines = [
        "<details>",
        f"<summary>{html.escape(shorten(one.nodeid, _NAME))}: {more} more on {html.escape(one.card)}</summary>",
    ]
    for title, parts in (("category", changes.categories), ("line", changes.lines)) if changes else ():
        moved = [part for part in parts if part.change_bytes]
        if moved:
            lines += ["", f"| {title} | `{_code(change.base)}` | here | change |", "|---|---:|---:|---:|"]
            lines += [_part(part) for part in moved[:_PARTS]]
            lines += [f"\n{len(moved) - _PARTS} more."] if len(moved) > _PARTS else []
    if len(lines) == 2:
        lines += ["", "Which lines grew is not known: one of the two runs did not record who held the peak."]
    return [*lines, "", "</details>"]


def _part(part: HolderChange) -> str:
    sizes = f"{format_bytes(part.before_bytes)} | {format_bytes(part.after_bytes)} | {change_text(part.change_bytes)}"
    return f"| {escape(shorten(part.name, _NAME))} | {sizes} |"


def _others(change: Comparison) -> list[str]:
    """Return sentences on what shrank, which tests are new or gone, and what the figures were measured on."""
    after, told = change.after, []
    if change.before is not None:
        old, new = baseline.peaks(change.before, failed=True), baseline.peaks(after, failed=True)
        changes = baseline.compare(after, old, change.tolerance)
        smaller = [f"{_test(c.nodeid)} (−{-c.percent:.1f}%)" for c in changes.improved]
        added, gone = (list(map(_test, names)) for names in (baseline.only_in(new, old), baseline.only_in(old, new)))
        kinds = (("smaller", smaller), ("new", added), ("gone", gone))
        told = [f"{title.capitalize()}: {_listed(names)}." for title, names in kinds if names]
    devices = ", ".join(dict.fromkeys(f"{escape(d.name)} ({d.kind})" for d in after.environment.devices)) or "no device"
    count = f"{len(after.tests)} test{'s' * (len(after.tests) != 1)}"
    notes = dict.fromkeys(
        note.name for test in after.tests for m in test.measurements for note in m.notes if note.figures
    )
    rest = f"<sub>{count} on {devices}; growth of up to {change.tolerance:g}% does not count."
    rest += f" Figures rest on assumptions: {escape(', '.join(notes))}." if notes else ""
    rest += f" [The page]({change.page}) is an artifact of the job." if change.page else ""
    return [*told, "", f"{rest}</sub>"] if told else [f"{rest}</sub>"]


def _test(nodeid: str) -> str:
    """Return the name of a test; a very long name is shortened in the middle."""
    return escape(shorten(nodeid, _NAME))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _PARTS} more" if len(names) > _PARTS else ""
    return ", ".join(names[:_PARTS]) + more


def _code(text: str) -> str:
    """Return the name of a branch, escaped for use in backticks in a table."""
    return text.replace("`", "'").replace("|", "\\|")
