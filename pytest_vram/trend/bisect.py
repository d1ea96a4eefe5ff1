"""Find the commit at which a test grew: ``git bisect`` in a temporary worktree, with a measurement at each step."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vram import baseline
from pytest_vram.errors import VramUsageError
from pytest_vram.memory.report import grew
from pytest_vram.report import disk
from pytest_vram.trend.measure import run_pytest, sources
from pytest_vram.trend.repository import checkout, commit_of, git
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

_FOUND = re.compile(r"^# first (?:bad|new) commit: \[(\w+)\]", re.MULTILINE)
_POSSIBLE = re.compile(r"^# possible first (?:bad|new) commit: \[(\w+)\]", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What to search for.

    Attributes:
        nodeid: the test.
        good: a revision at which the peak is small.
        bad: a later revision at which the peak is larger.
        gpu: the value of ``--vram-gpu``.
        tolerance: the growth in percent up to which a peak counts as unchanged.
        folder: the path from the top of the repository to pytest's root folder.
    """

    nodeid: str
    good: str
    bad: str
    gpu: str
    tolerance: float
    folder: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The result of a search.

    Attributes:
        commits: the commit, or several possible ones if commits among them could not be measured.
        before_bytes: the peak at the good revision.
        after_bytes: the peak at the found commit, or at the bad revision if there are several.
        steps: the number of commits that were measured, including both ends.
    """

    commits: tuple[str, ...]
    before_bytes: int
    after_bytes: int
    steps: int


def bisect(search: Search, repository: Path, tell: Callable[[str], None]) -> Found:
    """Search for the first commit at which the peak has grown over the good revision.

    Args:
        search: what to search for.
        repository: a folder of the repository. Its working tree and its own ``git bisect`` stay as they are.
        tell: called with a line of text after each measurement.

    Raises:
        VramUsageError: if a revision does not exist or cannot be measured, ``good`` is not an ancestor of ``bad``, or
            the peak did not grow between them.
    """
    good, bad = (commit_of(revision, repository) for revision in (search.good, search.bad))
    if git("merge-base", good, bad, folder=repository) != good or good == bad:
        raise VramUsageError(
            f"--good {search.good} is not an ancestor of --bad {search.bad}: choose two commits of one line of history"
        )
    peaks: dict[str, int] = {}
    with checkout(bad, repository) as tree:
        for name, commit in (("--bad", bad), ("--good", good)):
            git("checkout", "--quiet", "--detach", commit, folder=tree)
            size, problem = _measure(search, tree)
            if size is None:
                raise VramUsageError(f"{search.nodeid} cannot be measured at {name} {commit[:9]}: {problem}")
            peaks[commit] = size
            tell(f"{commit[:9]} {format_bytes(size):>9}  {name[2:]}")
        if not grew(peaks[good], peaks[bad], search.tolerance):
            raise VramUsageError(
                f"{search.nodeid} needs {format_bytes(peaks[good])} at {good[:9]} and {format_bytes(peaks[bad])} at"
                f" {bad[:9]}: it did not grow by more than {search.tolerance:g}% between them"
            )
        commits = _search(search, tree, good, bad, peaks, tell)
    after = peaks.get(commits[0], peaks[bad]) if len(commits) == 1 else peaks[bad]
    return Found(commits=commits, before_bytes=peaks[good], after_bytes=after, steps=len(peaks))


def _search(
    search: Search, tree: Path, good: str, bad: str, peaks: dict[str, int], tell: Callable[[str], None]
) -> tuple[str, ...]:
    """Measure the commits that git chooses, and return the first bad commit, or all possible ones."""
    git("bisect", "start", bad, good, folder=tree)
    try:
        while True:
            log = git("bisect", "log", folder=tree)
            if found := _FOUND.findall(log):
                return (found[-1],)
            if possible := _POSSIBLE.findall(log):
                return tuple(possible)
            commit = git("rev-parse", "HEAD", folder=tree)
            size, problem = _measure(search, tree)
            if size is None:
                tell(f"{commit[:9]}       n/a  skipped: {problem}")
                verdict = "skip"
            else:
                peaks[commit] = size
                verdict = "bad" if grew(peaks[good], size, search.tolerance) else "good"
                tell(f"{commit[:9]} {format_bytes(size):>9}  {verdict}")
            _answer(verdict, tree)
    finally:
        git("bisect", "reset", "HEAD", folder=tree)


def _answer(verdict: str, tree: Path) -> None:
    """Tell git the verdict. If only skipped commits are left, git fails, but the log names the possible commits."""
    try:
        git("bisect", verdict, folder=tree)
    except VramUsageError:
        if not _POSSIBLE.search(git("bisect", "log", folder=tree)):
            raise


def _measure(search: Search, tree: Path) -> tuple[int | None, str]:
    """Return the peak of the test at the commit that is checked out, or ``None`` and why."""
    folder = tree / search.folder
    if not folder.is_dir():
        return None, f"there is no folder {search.folder}"
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "vram.json")
        code = run_pytest(
            ["-q", "-p", "no:cacheprovider", search.nodeid],
            folder=folder,
            outputs=[output],
            gpu=search.gpu,
            # Two checkouts within one second can have files of equal size, so Python could use outdated bytecode.
            variables={**sources(tree, search.folder), "PYTHONDONTWRITEBYTECODE": "1"},
            quiet=True,
        )
        if not output.exists():
            return None, f"pytest ended with exit code {code}, and without a report"
        report = disk.load(output)
    measured = [test for test in report.tests if test.outcome != "skipped"]
    peaks = [peak for test in measured for peak in baseline.peaks_of(test, idle=True).values()]
    return (max(peaks), "") if peaks else (None, f"pytest ended with exit code {code}, and measured nothing")
