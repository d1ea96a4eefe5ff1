"""Render a report as Markdown for a CI summary: a table, and a collapsed section for each failed test."""

from __future__ import annotations

import html
import re
from collections import Counter
from typing import TYPE_CHECKING

from pytest_vram.memory import note_lines, without_size
from pytest_vram.report import likely
from pytest_vram.report.host_memory import details, markdown_lines
from pytest_vram.report.rows import Row, change_text, refusals_text, row_change, rows, uneven_text, work_text
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from pytest_vram.memory import Report

_MOST_ROWS, _MOST_DETAILS, _MOST_HOLDERS = 200, 50, 10  # a summary has room for 1 MiB
_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~])")
_MARKS = {"exceeded": "❌", "unmeasured": "❔", "within": "✅", "none": ""}


def render(report: Report) -> str:
    """Return the report in GitHub's Markdown. Special characters in names are escaped."""
    table = rows(report)
    broken = [row for row in table if row.verdict == "exceeded"]
    unmeasured = sum(row.verdict == "unmeasured" for row in table)
    devices = (
        ", ".join(dict.fromkeys(f"{escape(d.name)} ({d.kind})" for d in report.environment.devices)) or "no device"
    )
    told = [f"{len(broken)} over budget", f"{unmeasured} not measured"]
    host = [row for row in table if row.host is not None and row.host.over_bytes]
    named = {row.nodeid for row in (*broken, *host)}
    others = sum(row.outcome == "failed" and row.nodeid not in named for row in table)
    told += [f"{len(host)} over the budget of host memory"] * bool(host)
    told += [f"{others} failed for another reason"] * bool(others)
    lines = [
        "## GPU memory",
        "",
        f"{len(table)} test{'s' * (len(table) != 1)} on {devices}: {', '.join(told)}.",
        "",
        f"| | test | peak |{' change |' if report.baseline else ''} fixtures | budget | used | kind |",
        f"|---|---|---:|{'---:|' if report.baseline else ''}---:|---:|---:|---|",
        *(_line(row, changes=report.baseline is not None) for row in table[:_MOST_ROWS]),
    ]
    if len(table) > _MOST_ROWS:
        lines.append(f"\n{len(table) - _MOST_ROWS} more tests, all with smaller peaks.")
    lines += _notes(table)
    if measured := markdown_lines(table):
        lines += ["", "Host memory:", "", *(f"- {escape(nodeid)}: {escape(words)}" for nodeid, words in measured)]
    failed = [row for row in table if row.outcome == "failed" or row.verdict == "exceeded"]
    lines += _ranks(table)
    for row in failed[:_MOST_DETAILS]:
        lines += ["", *_details(row)]
    if len(failed) > _MOST_DETAILS:
        lines.append(f"\n{len(failed) - _MOST_DETAILS} more tests failed.")
    return "\n".join(lines) + "\n"


def _notes(table: list[Row]) -> list[str]:
    """Render the assumptions, and the tests that ran out of memory. Passed tests are included."""
    tests = Counter(without_size(note) for row in table for note in row.notes)
    lines = [
        f"- {escape(f'{note.name}: {note.text}')} ({count} test{'s' * (count > 1)})" for note, count in tests.items()
    ]
    found = ["", "Notes on these figures:", "", *lines] if lines else []
    refused = [f"- {escape(row.nodeid)}: {refusals_text(row)}" for row in table if row.ooms]
    bounds = [f"- {escape(nodeid)}: {words}" for nodeid, words in likely.lines(table)]
    if bounds:
        found += ["", f"{likely.TITLE.capitalize()}", "", *bounds[:_MOST_DETAILS]]
    return [*found, *(["", "The card was full:", "", *refused[:_MOST_DETAILS]] if refused else [])]


def escape(text: str) -> str:
    """Escape text for Markdown and HTML, and join its lines."""
    return _SPECIAL.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _line(row: Row, *, changes: bool) -> str:
    used = "" if row.used is None else f"{row.used * 100:.0f}%"
    budget = "" if row.budget_bytes is None else format_bytes(row.budget_bytes)
    fixtures = format_bytes(row.fixtures_bytes) if row.fixtures_bytes else ""
    change = f" {row_change(row)} |" if changes else ""
    return (
        f"| {_MARKS[row.verdict]} | {escape(row.nodeid)} | {format_bytes(row.peak_bytes)} |"
        f"{change} {fixtures} | {budget} | {used} | {row.kind or ''} |"
    )


def _ranks(table: list[Row]) -> list[str]:
    """Render a table of the child processes of each test that has any, and sentences on their imbalance."""
    several = [row for row in table if row.ranks]
    if not several:
        return []
    lines = ["", "| processes of | peak | rank or command | card |", "|---|---:|---|---:|"]
    lines += [
        f"| {escape(row.nodeid)} | {format_bytes(rank.peak_bytes)} | {escape(rank.title)} |"
        f" {'' if rank.card is None else rank.card} |"
        for row in several[:_MOST_DETAILS]
        for rank in row.ranks[:_MOST_HOLDERS]
    ]
    uneven = [row for row in several[:_MOST_DETAILS] if row.imbalance is not None]
    return [*lines, *(f"\n{escape(row.nodeid)}: {uneven_text(row.imbalance or 0)}." for row in uneven)]


def _details(row: Row) -> list[str]:
    peak = "" if row.peak_bytes is None else f" ({row.peak_bytes:,} bytes)"
    lines = [
        "<details>",
        f"<summary>{html.escape(row.nodeid)}: {_what(row)}</summary>",
        "",
        f"- peak {row.metric}: {format_bytes(row.peak_bytes)}{peak}",
    ]
    if row.budget_bytes is not None:
        lines.append(f"- budget: {format_bytes(row.budget_bytes)} ({row.budget_bytes:,} bytes)")
    lines.append(f"- allocated {format_bytes(row.allocated_bytes)}, reserved {format_bytes(row.reserved_bytes)}")
    if row.fragmented_bytes:
        lines.append(f"- lost to fragmentation at the peak: {format_bytes(row.fragmented_bytes)}")
    if row.regressed:
        lines.append(f"- in the baseline: {format_bytes(row.baseline_bytes)} ({change_text(row.change_bytes)})")
    if row.leaked_bytes:
        lines.append(f"- left behind: {format_bytes(row.leaked_bytes)}")
    lines += [
        f"- {share.scope} fixture {escape(share.name)}: {format_bytes(share.size_bytes)}" for share in row.fixtures
    ]
    lines += [
        f"- {escape(rank.title)}: {format_bytes(rank.peak_bytes)}{f' ({escape(rank.missing)})' if rank.missing else ''}"
        for rank in row.ranks[:_MOST_HOLDERS]
    ]
    if row.imbalance is not None:
        lines.append(f"- of {len(row.ranks)} processes {uneven_text(row.imbalance)}")
    if row.host is not None and row.host.over_bytes:
        lines += [f"- host memory: {escape(line)}" for line in details(row.host)]
    if row.work is not None:
        lines.append(f"- {work_text(row.work)}")
    lines += [
        f"- phase {escape(p.name)}: {format_bytes(p.peak.allocated_bytes)}{'; ' * (p.work is not None)}"
        f"{work_text(p.work)}"
        for p in row.phases
    ]
    lines += [f"- note: {escape(line)}" for line in note_lines(row.notes)]
    if row.ooms:
        lines.append(f"- {refusals_text(row)}")
    if row.worst_example:
        lines.append(f"- worst example: {escape(row.worst_example)}")
    if row.holders:
        lines += ["", "| held at the peak | blocks | category | module | line |", "|---:|---:|---|---|---|"]
        lines += [
            f"| {format_bytes(h.size_bytes)} | {h.count} | {escape(h.category or '')} | {escape(h.module or '')} |"
            f" {escape(h.location)} |"
            for h in row.holders[:_MOST_HOLDERS]
        ]
    return [*lines, "", "</details>"]


def _what(row: Row) -> str:
    """Return why the test failed, as far as its figures show."""
    if row.verdict == "exceeded" and row.peak_bytes is not None and row.budget_bytes is not None:
        return f"{format_bytes(row.peak_bytes - row.budget_bytes)} over its budget"
    if row.host is not None and row.host.over_bytes:
        return f"{format_bytes(row.host.over_bytes)} of host memory over its budget"
    if row.regressed:
        return f"{change_text(row.change_bytes)} over the baseline"
    return f"left {format_bytes(row.leaked_bytes)} behind" if row.leaked_bytes else "failed"
