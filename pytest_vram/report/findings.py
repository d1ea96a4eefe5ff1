"""The findings of a report: each budget that was broken, and the lines of code that hold the most.

Annotations, SARIF and code-quality files show the same findings.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pytest_vram.report.rows import change_text, rows
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_vram.memory import Report, TestRecord
    from pytest_vram.report.rows import Row

Rule = Literal["over-budget", "over-host-budget", "grew", "left-memory", "not-measured"]

RULES: dict[Rule, str] = {
    "over-budget": "The test needs more GPU memory than its budget allows.",
    "over-host-budget": "The test needs more host memory than max_host_gb allows.",
    "grew": "The test needs more GPU memory than its baseline, by more than the tolerance.",
    "left-memory": "The test leaves more GPU memory allocated than max_leak_mb allows.",
    "not-measured": "The test has a budget, and its GPU memory was not measured.",
}
"""Each rule, with the sentence that explains it."""
_LINES = 3
"""The number of lines of code that are named for each test."""
_LOCATION = re.compile(r"(?P<path>.+?):(?P<line>\d+)(?: in .*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A line of a file; ``path`` is relative to the repository, with slashes."""

    path: str
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One broken rule at one line of code.

    Attributes:
        rule: the rule.
        level: ``error``, or ``warning`` if nothing is known to be broken.
        nodeid: the test.
        text: what is wrong, in one line.
        place: the line of code; ``None`` if no file of the repository is known.
        fingerprint: a text that identifies the finding; it does not change when lines are added or removed above it.
    """

    rule: Rule
    level: Literal["error", "warning"]
    nodeid: str
    text: str
    place: Place | None
    fingerprint: str


class Places:
    """Finds the files that a report names.

    Args:
        folder: the folder that the tests ran in; the report's paths are relative to it.
        top: the folder of the repository; the paths of findings are relative to it.
    """

    def __init__(self, folder: Path, top: Path) -> None:
        self._folder, self._top = folder.resolve(), top.resolve()

    def find(self, location: str) -> Place | None:
        """Return the place of ``file:line`` or ``file:line in function``; ``None`` if the repository has no such file.

        Lines of installed libraries have no place.
        """
        match = _LOCATION.fullmatch(location)
        if match is None:
            return None
        path = (self._folder / match["path"]).resolve()
        if not path.is_relative_to(self._top) or not path.is_file():
            return None
        return Place(path=path.relative_to(self._top).as_posix(), line=max(1, int(match["line"])))

    def find_test(self, test: TestRecord) -> Place | None:
        """Return the place of a test's budget, or the first line of its file."""
        found = self.find(test.budget.where) if test.budget else None
        return found or self.find(f"{test.nodeid.partition('::')[0]}:1")


def findings(report: Report, places: Places) -> list[Finding]:
    """Return the findings of a report, tests over their budget first. All findings of a test are of the same rule."""
    tests = {test.nodeid: test for test in report.tests}
    return [finding for shown in rows(report) for finding in _of_test(tests[shown.nodeid], shown, places)]


def _of_test(test: TestRecord, shown: Row, places: Places) -> list[Finding]:
    broken = _broken(test, shown)
    if broken is None:
        return []
    rule, text = broken
    held: dict[Place, tuple[int, str]] = {}
    for holder in shown.holders:
        place = places.find(holder.location)
        if place is not None:
            held[place] = (held.get(place, (0, ""))[0] + holder.size_bytes, holder.location)
    largest = sorted(held.items(), key=lambda item: -item[1][0])[:_LINES]
    # The lines of a row held memory of the device, so they say nothing about the host's memory.
    if rule in ("not-measured", "over-host-budget") or not largest:
        return [_finding(rule, test, text, places.find_test(test), "")]
    return [
        _finding(
            rule, test, f"{text}. This line holds {format_bytes(size)} at the peak.", place, _without_line(location)
        )
        for place, (size, location) in largest
    ]


def _broken(test: TestRecord, shown: Row) -> tuple[Rule, str] | None:
    """Return the rule that the test broke, and a sentence without its full stop."""
    if shown.verdict == "exceeded" and shown.peak_bytes is not None and shown.budget_bytes is not None:
        over = format_bytes(shown.peak_bytes - shown.budget_bytes)
        needed = f"{shown.nodeid} needs {format_bytes(shown.peak_bytes)} of {shown.metric} memory"
        return "over-budget", f"{needed}, {over} more than its budget of {format_bytes(shown.budget_bytes)}"
    host = shown.host
    if host is not None and host.over_bytes:
        needed = f"{shown.nodeid} needs {format_bytes(host.peak_bytes)} of host memory"
        budget = format_bytes(host.limit_bytes)
        return "over-host-budget", f"{needed}, {format_bytes(host.over_bytes)} more than its budget of {budget}"
    if shown.regressed:
        return "grew", (
            f"{shown.nodeid} needs {format_bytes((shown.baseline_bytes or 0) + (shown.change_bytes or 0))},"
            f" {change_text(shown.change_bytes)} over its baseline of {format_bytes(shown.baseline_bytes)}"
        )
    allowed = test.budget.max_leak_bytes if test.budget else None
    if allowed is not None and shown.leaked_bytes is not None and shown.leaked_bytes > allowed:
        left = format_bytes(shown.leaked_bytes)
        return "left-memory", f"{shown.nodeid} left {left} behind, allowed are {format_bytes(allowed)}"
    if shown.verdict == "unmeasured":
        return "not-measured", f"{shown.nodeid} has a budget that was not measured: {shown.reason}"
    return None


def _finding(rule: Rule, test: TestRecord, text: str, place: Place | None, line: str) -> Finding:
    words = "\0".join((rule, test.nodeid, place.path if place else "", line))
    return Finding(
        rule=rule,
        level="warning" if rule == "not-measured" else "error",
        nodeid=test.nodeid,
        text=" ".join(text.split()),
        place=place,
        fingerprint=hashlib.sha256(words.encode()).hexdigest()[:32],
    )


def _without_line(location: str) -> str:
    """Return the function of a location, which remains the same while its line number changes."""
    return location.rpartition(" in ")[2]
