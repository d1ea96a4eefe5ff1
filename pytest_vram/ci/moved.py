"""Find where a line of an earlier commit is now, so that a report of that commit can be compared line by line."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_vram.trend.repository import git

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_vram.memory import Report

_FILE = re.compile(r"^(?:---|\+\+\+) (?:[ab]/(?P<path>.*?)|/dev/null)\t?$")
_HUNK = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_LOCATION = re.compile(r"(.+?):(\d+)( in .*)?")

Hunk = tuple[int, int, int, int]
"""The first line and the number of lines before the change, and the same after it."""


class Moves:
    """Translates lines of an earlier commit to the files as they are now.

    Args:
        base: the earlier commit.
        folder: the folder that the tests ran in; locations are relative to it.

    Raises:
        GitError: if git does not know the commit.
    """

    def __init__(self, base: str, folder: Path) -> None:
        options = ["--no-color", "--no-ext-diff", "--no-textconv", "--unified=0", "--find-renames", "--relative"]
        prefixes = ["--src-prefix=a/", "--dst-prefix=b/"]
        self._files = _parse(git("diff", *options, *prefixes, base, "--", ".", folder=folder))

    def now(self, location: str) -> str:
        """Return the location as it is in the current files; for a removed line, the location with ``(before)`` added.

        A line inside a changed block is taken to be the line at the same position of the new block if both blocks have
        the same length.
        """
        match = _LOCATION.fullmatch(location)
        if match is None or match[1] not in self._files:
            return location
        path, hunks = self._files[match[1]]
        line, shift = int(match[2]), 0
        for start, count, new_start, new_count in hunks:
            if count and start <= line < start + count:
                if count != new_count:
                    return f"{location} (before)"
                return f"{path}:{new_start + line - start}{match[3] or ''}"
            # If a hunk only adds lines, git names the line after which they are added.
            if line >= start + count and (count or line > start):
                shift += new_count - count
        return f"{path}:{line + shift}{match[3] or ''}" if path else f"{location} (before)"

    def report(self, before: Report) -> Report:
        """Return an earlier report with the lines of its holders as they are now."""
        tests = []
        for test in before.tests:
            measurements = tuple(
                replace(m, holders=tuple(replace(h, location=self.now(h.location)) for h in m.holders))
                for m in test.measurements
            )
            tests.append(replace(test, measurements=measurements))
        return replace(before, tests=tuple(tests))


def _parse(diff: str) -> dict[str, tuple[str, list[Hunk]]]:
    """Return, for each old path, the new path (empty if the file was removed) and the hunks."""
    files: dict[str, tuple[str, list[Hunk]]] = {}
    old: str | None = None
    hunks: list[Hunk] = []
    skip = 0  # lines of a hunk, which may look like headers
    for text in diff.split("\n"):  # splitlines() would end a line at a form feed too, and git does not
        if skip:
            skip -= not text.startswith("\\")
        elif text.startswith("diff --git "):
            old, hunks = None, []  # the hunks of a new file belong to no old file
        elif found := _HUNK.match(text):
            first, count, new, new_count = (1 if part is None else int(part) for part in found.groups())
            hunks.append((first, count, new, new_count))
            skip = count + new_count
        elif text.startswith("rename from "):
            old = text.removeprefix("rename from ")
        elif text.startswith("rename to ") and old is not None:
            hunks = []
            files[old] = text.removeprefix("rename to "), hunks
        elif text.startswith("--- ") and (found := _FILE.match(text)):
            old = found["path"]
        elif text.startswith("+++ ") and (found := _FILE.match(text)) and old is not None:
            hunks = files[old][1] if old in files else []
            files[old] = found["path"] or "", hunks
    return files
