"""Ask git about the repository around a folder, and check out a commit beside the working tree."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vram.errors import VramUsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_SECONDS = 600
_SET_BY_GIT = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY")
"""Variables that git sets for its hooks. They would direct every call to the repository of the hook."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The commit that a working tree is at.

    Attributes:
        commit: its full hash; ``None`` if there is no commit or no repository.
        committed: when it was committed, in ISO format.
        subject: the first line of its message.
        branch: the branch; ``None`` if the head is detached.
        dirty: whether tracked files differ from the commit.
        folder: the path from the top of the repository to the folder that was asked about, with slashes.
        problem: why there is no commit; ``""`` if there is one.
    """

    commit: str | None = None
    committed: str | None = None
    subject: str = ""
    branch: str | None = None
    dirty: bool = False
    folder: str = ""
    problem: str = ""


class GitError(VramUsageError):
    """A git command failed. The message contains what git said."""


def git(*arguments: str, folder: Path) -> str:
    """Run a git command in a folder, and return its output without the last line break.

    Raises:
        GitError: if git is not installed, the command did not end within ten minutes, or it failed.
    """
    # Without these settings, the output may have quoted paths, colours, signatures or translated messages.
    plain = ("core.quotePath=false", "color.ui=false", "log.showSignature=false")
    command = ["git", *(part for setting in plain for part in ("-c", setting)), *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment() | {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"},
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise GitError("git is not installed" if folder.is_dir() else f"there is no folder {folder}") from error
    except subprocess.TimeoutExpired as error:
        raise GitError(f"`git {arguments[0]}` did not end within {_SECONDS} s") from error
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        raise GitError(f"`git {' '.join(arguments)}` failed: {said[-1] if said else f'exit code {done.returncode}'}")
    return done.stdout.decode(errors="replace").rstrip("\n")


def environment() -> dict[str, str]:
    """Return this process's environment without the variables that git sets for its hooks."""
    return {name: value for name, value in os.environ.items() if name not in _SET_BY_GIT}


def head(folder: Path, *, without: Path | None = None) -> Head:
    """Return the commit that the working tree around ``folder`` is at.

    Args:
        folder: a folder of the working tree.
        without: a folder whose changes do not make the tree dirty.
    """
    try:
        top = Path(git("rev-parse", "--show-toplevel", folder=folder))
    except GitError as error:
        return Head(problem=str(error))
    below = folder.resolve().relative_to(top.resolve()).as_posix() if folder.resolve() != top.resolve() else ""
    try:
        commit, committed, subject = git("log", "-1", "--format=%H%x00%cI%x00%s", folder=top).split("\0")
    except GitError as error:
        return Head(folder=below, problem=f"the repository has no commit yet ({error})")
    branch = git("branch", "--show-current", folder=top) or None
    paths = ["--", "."]
    if without is not None and without.resolve().is_relative_to(top.resolve()):
        inside = without.resolve().relative_to(top.resolve()).as_posix()
        paths.append(f":(top,exclude){inside}")
    changed = git("status", "--porcelain", "--untracked-files=no", *paths, folder=top)
    return Head(commit=commit, committed=committed, subject=subject, branch=branch, dirty=bool(changed), folder=below)


def parents(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return the parents of every commit that the head descends from, with ancestors before descendants.

    Raises:
        GitError: if there is no repository or no commit, or the clone is shallow, so that commits are missing.
    """
    if git("rev-parse", "--is-shallow-repository", folder=folder) == "true":
        raise GitError("the clone is shallow, so git does not know all commits (`git fetch --unshallow` gets them)")
    lines = git("rev-list", "--topo-order", "--reverse", "--parents", "HEAD", folder=folder).splitlines()
    return {line.split()[0]: tuple(line.split()[1:]) for line in lines}


def commits_between(before: str, after: str, folder: Path) -> int:
    """Return how many commits lie between two, neither of them included.

    Raises:
        GitError: if git does not know one of them.
    """
    return max(0, int(git("rev-list", "--count", f"{before}..{after}", folder=folder)) - 1)


def commit_of(revision: str, folder: Path) -> str:
    """Return the full hash of a revision's commit.

    Raises:
        GitError: if there is no such revision.
    """
    return git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}", folder=folder)


@contextlib.contextmanager
def checkout(revision: str, folder: Path) -> Iterator[Path]:
    """Check out a revision in a temporary worktree, and yield its path. The user's own tree is not changed.

    Raises:
        GitError: if there is no such revision, or it cannot be checked out.
    """
    commit = commit_of(revision, folder)
    with tempfile.TemporaryDirectory(prefix="pytest-vram-") as parent:
        tree = Path(parent, "tree")
        try:
            git("worktree", "add", "--detach", "--quiet", str(tree), commit, folder=folder)
            yield tree
        finally:
            with contextlib.suppress(GitError):  # the worktree may not exist
                git("worktree", "remove", "--force", str(tree), folder=folder)
            with contextlib.suppress(GitError):
                git("worktree", "prune", folder=folder)
