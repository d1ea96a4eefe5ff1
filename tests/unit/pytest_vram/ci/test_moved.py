from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from pytest_vram.ci.moved import Moves
from pytest_vram.trend.repository import GitError

if TYPE_CHECKING:
    from pathlib import Path


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def moves(tmp_path_factory: pytest.TempPathFactory) -> Moves:
    """The tests ran in the folder ``sub``."""
    folder = tmp_path_factory.mktemp("moved")
    (folder / "sub").mkdir()
    lines = [f"line {n}\n" for n in range(1, 21)]
    (folder / "sub/a.py").write_text("".join(lines))
    (folder / "sub/old.py").write_text("".join(f"old {n}\n" for n in range(20)))
    (folder / "sub/dead.py").write_text("x\n")
    (folder / "sub/ä b.py").write_text("x\ny\n")
    (folder / "sub/pages.py").write_text("x\n\f\f\f\n-- a/same.py\ny\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "one")
    base = git(folder, "rev-parse", "HEAD")
    lines[4] = "changed 5\n"  # one line for one
    lines[9:11] = ["changed 10\n"]  # two lines for one
    lines[0:0] = ["--- a/looks.py\n", "+++ b/looks.py\n"]  # two lines before the first
    (folder / "sub/a.py").write_text("".join(lines))
    git(folder, "mv", "sub/old.py", "sub/new.py")
    git(folder, "rm", "-q", "sub/dead.py")
    (folder / "sub/ä b.py").write_text("new\nx\ny\n")
    (folder / "sub/pages.py").write_text("x\nnew\n++ b/other.py\nand\ny\n")  # looks like headers
    (folder / "sub/added.py").write_text("new\n" * 5)  # comes after a.py in the diff
    git(folder, "add", "-A")
    return Moves(base, folder / "sub")


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("a.py:1 in f", "a.py:3 in f"),
        ("a.py:5 in f", "a.py:7 in f"),
        ("a.py:6", "a.py:8"),
        ("a.py:10 in f", "a.py:10 in f (before)"),
        ("a.py:12 in f", "a.py:13 in f"),
        ("a.py:20 in f", "a.py:21 in f"),
        ("old.py:3 in f", "new.py:3 in f"),
        ("dead.py:1 in f", "dead.py:1 in f (before)"),
        ("ä b.py:2 in f", "ä b.py:3 in f"),
        ("pages.py:4 in f", "pages.py:5 in f"),
        ("same.py:4 in f", "same.py:4 in f"),
        ("backward pass", "backward pass"),
    ],
)
def test_a_line_is_found_where_it_is_now(moves: Moves, before: str, now: str) -> None:
    assert moves.now(before) == now


def test_a_commit_that_is_not_there_is_named(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    with pytest.raises(GitError, match="no-such-commit"):
        Moves("no-such-commit", tmp_path)
