"""Publish what was measured for the reviewers of a pull request: as annotations, summary, comment, page and files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_vram import baseline
from pytest_vram.ci import comment, github
from pytest_vram.ci.measure import AFTER, BASE, BEFORE, NO_BASE
from pytest_vram.ci.moved import Moves
from pytest_vram.errors import VramUsageError
from pytest_vram.report import code_quality, disk, files, markdown, sarif, workflow
from pytest_vram.report.findings import Places, findings
from pytest_vram.trend.repository import GitError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_vram.ci.github import Job
    from pytest_vram.memory import Report

PAGE, SARIF, CODE_QUALITY, COMMENT = "vram.html", "vram.sarif", "vram.codequality.json", "comment.md"


def publish(
    into: Path,
    job: Job,
    *,
    folder: Path,
    tolerance: float,
    name: str,
    comments: bool,
    tell: Callable[[str], None],
) -> list[baseline.Change]:
    """Publish the reports of a folder, and return the tests that grew over the base.

    Args:
        into: the folder with the reports; the page and the other files are written there.
        job: the job.
        folder: the folder that the tests ran in.
        tolerance: the growth in percent up to which a peak counts as unchanged.
        name: a name that distinguishes the comments of several jobs.
        comments: whether to comment on the pull request.
        tell: called with each line for the log of the job, including workflow commands.

    Raises:
        VramUsageError: if there is no report of the change.
    """
    after, before = _report(into), _before(into, folder, tell)
    held = after
    if before is not None and after.baseline is None:
        peaks = baseline.peaks(before, failed=True)
        held = baseline.held_against(after, peaks, source=job.base_name, tolerance=tolerance)
    places = Places(folder, job.workspace)
    for line in workflow.render(findings(held, places)):
        tell(line)
    disk.write_atomically(into / PAGE, files.to_html(held, before))
    disk.write_atomically(into / SARIF, sarif.render(held, places))
    disk.write_atomically(into / CODE_QUALITY, code_quality.render(held, places))
    reason = into / NO_BASE
    change = comment.Comparison(
        after=after,
        before=before,
        base=job.base_name,
        no_base=reason.read_text(encoding="utf-8").strip() if reason.exists() else "",
        tolerance=tolerance,
        page=job.link,
        name=name,
    )
    body = comment.render(change)
    disk.write_atomically(into / COMMENT, body)
    if job.summary is not None:
        with job.summary.open("a", encoding="utf-8") as summary:
            summary.write(f"{body}\n{markdown.render(held)}" if before is not None else markdown.render(held))
    if comments and job.pull_request is not None:
        _comment(job, body, tell)
    return comment.grown(change)


def _report(into: Path) -> Report:
    try:
        return disk.load(into / AFTER)
    except VramUsageError as error:
        raise VramUsageError(
            f"{error}. `python -m pytest_vram ci measure --into {into}` writes it; where it ran, pytest ended before"
            " the first test, and its output says why"
        ) from error


def _before(into: Path, folder: Path, tell: Callable[[str], None]) -> Report | None:
    """Return the report of the base, with its lines as they are now."""
    if not (into / BEFORE).exists():
        return None
    before = disk.load(into / BEFORE)
    try:
        commit = (into / BASE).read_text(encoding="utf-8").strip()
        return Moves(commit, folder).report(before)
    except (OSError, GitError) as error:
        tell(f"the lines of the base are compared by their old numbers: {error}")
        return before


def _comment(job: Job, body: str, tell: Callable[[str], None]) -> None:
    """Write the comment; if that fails, only warn, because only budgets may make the job fail."""
    try:
        tell(f"comment {github.comment(job, body)}")
    except github.CommentError as error:
        tell(workflow.command("warning", str(error), title="GPU memory: no comment"))
