"""Measure a change, and the commit that it is based on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_vram.errors import VramUsageError
from pytest_vram.report import disk
from pytest_vram.trend.measure import run_pytest, sources
from pytest_vram.trend.repository import GitError, checkout, commit_of, git, head

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

AFTER, BEFORE, BASE, NO_BASE = "vram.json", "base.json", "base-commit.txt", "no-base.txt"
"""Files of the folder that the steps of a job share: the reports of the change and of its base, the base's commit, and
the reason if there is no report of the base."""


def measure(into: Path, arguments: Sequence[str], *, gpu: str, folder: Path) -> int:
    """Measure the working tree, and return pytest's exit code.

    Args:
        into: the folder for the report.
        arguments: pytest's arguments.
        gpu: the card to imitate, or another value of ``--vram-gpu``.
        folder: the folder to run in.
    """
    output = (into / AFTER).resolve()
    output.unlink(missing_ok=True)
    return run_pytest([*_required(gpu), *arguments], folder=folder, outputs=[output], gpu=gpu)


def measure_base(into: Path, base: str, arguments: Sequence[str], *, gpu: str, folder: Path) -> str:
    """Measure a commit in a temporary worktree, and return why that is not possible; ``""`` if it worked.

    Failed tests do not matter, because the commit is only measured for comparison. The reason is also written to the
    folder, for the comment.
    """
    into.mkdir(parents=True, exist_ok=True)
    output, reason = (into / BEFORE).resolve(), into / NO_BASE
    for old in (output, reason, into / BASE):
        old.unlink(missing_ok=True)
    try:
        _fetch(base, folder)
        here = head(folder).folder
        with checkout(base, folder) as tree:
            if not (tree / here).is_dir():
                raise VramUsageError(f"it has no folder {here}")
            code = run_pytest(
                [*_required(gpu), "-p", "no:cacheprovider", *arguments],
                folder=tree / here,
                outputs=[output],
                gpu=gpu,
                variables=sources(tree, here),
            )
        if not output.exists():
            raise VramUsageError(f"pytest ended with exit code {code}, and without a report")
        disk.load(output)
        (into / BASE).write_text(commit_of(base, folder) + "\n", encoding="utf-8")
    except VramUsageError as error:
        problem = f"the base {base[:12]} could not be measured: {error}"
        reason.write_text(problem + "\n", encoding="utf-8")
        return problem
    return ""


def _required(gpu: str) -> list[str]:
    """Return options that make a job fail if its device does not work, instead of skipping every budget."""
    kind = gpu.partition(":")[0]
    return ["--vram-timeline", *([f"--vram-require={kind}"] if kind in ("dry", "cuda", "host") else [])]


def _fetch(base: str, folder: Path) -> None:
    """Fetch a commit that a shallow clone lacks."""
    if base.startswith("-"):
        raise VramUsageError(f"--rev {base} is not the name of a commit")
    try:
        git("cat-file", "-e", f"{base}^{{commit}}", folder=folder)
    except GitError:
        try:
            git("fetch", "--quiet", "--no-tags", "--depth=1", "origin", base, folder=folder)
        except GitError as error:
            raise GitError(f"the clone does not have the commit, and {error}") from error
