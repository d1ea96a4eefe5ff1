"""Render the findings of a report as GitHub's workflow commands, which annotate lines of a pull request."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_vram.report.findings import Finding, Place

MOST = 10
"""The most annotations of each level that GitHub shows from one step; it silently drops the rest."""
_TITLES = {
    "over-budget": "GPU memory over budget",
    "over-host-budget": "Host memory over budget",
    "grew": "GPU memory grew",
    "left-memory": "GPU memory left behind",
    "not-measured": "GPU memory not measured",
}


def render(found: Sequence[Finding]) -> list[str]:
    """Return one command for each line of code, the worst first. Tests that blame the same line share its command."""
    groups: dict[tuple[str, str, Place | str], list[Finding]] = {}
    for finding in found:
        groups.setdefault((finding.level, finding.rule, finding.place or finding.nodeid), []).append(finding)
    lines: list[str] = []
    for level in ("error", "warning"):
        chosen = [findings for (of, _, _), findings in groups.items() if of == level]
        # The command that tells how many more there are takes the place of one annotation.
        shown = chosen if len(chosen) <= MOST else chosen[: MOST - 1]
        for findings in shown:
            place = findings[0].place
            where = {"file": place.path, "line": str(place.line)} if place else {}
            title = _TITLES[findings[0].rule]
            lines.append(command(level, "\n".join(finding.text for finding in findings), title=title, **where))
        if len(chosen) > len(shown):
            text = f"{len(chosen) - len(shown)} more lines; the summary of the job and its page show every test."
            lines.append(command(level, text, title="GPU memory"))
    return lines


def command(name: str, text: str, **properties: str) -> str:
    """Return a workflow command such as ``::error file=a.py,line=3::text``, with everything escaped."""
    given = ",".join(f"{key}={_escape(value, ':', ',')}" for key, value in properties.items())
    return f"::{name}{' ' if given else ''}{given}::{_escape(text)}"


def _escape(text: str, *more: str) -> str:
    for character in ("%", "\r", "\n", *more):
        text = text.replace(character, f"%{ord(character):02X}")
    return text
