"""``--vram-history``, ``history`` and ``history --bisect``, in repositories whose memory is made up."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from made_up_repository import ENVIRONMENT, Repository

from pytest_vram import cli

if TYPE_CHECKING:
    from conftest import Project

TEST = "test_it.py::test_step"
RECORD = "--vram-history=vram-history"


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Repository, list[str]]:
    """Seven commits, of which the fifth makes the test larger and the third cannot be collected; two are recorded."""
    repository = Repository(tmp_path_factory.mktemp("grown") / "repository")
    commits = [repository.commit("Start", 100)]
    repository.pytest(RECORD)
    commits.append(repository.commit("Docs"))
    repository.write("model.py", "import no_such_module\n")
    commits.append(repository.commit("Break the import"))
    commits.append(repository.commit("Mend it", 101))
    commits.append(repository.commit("Keep the logits in fp32", 140))
    commits.append(repository.commit("More docs"))
    commits.append(repository.commit("Tidy up", 139))
    repository.pytest(RECORD, "--vram-timeline")
    return repository, commits


def test_the_commit_at_which_a_test_grew_is_named_and_found(grown: tuple[Repository, list[str]]) -> None:
    repository, commits = grown
    shown = repository.vram("history", "-o", "out.html")
    assert f"{TEST} on Made-up 9000 (cuda)" in shown
    assert f"grew +39.0% (100 MiB -> 139 MiB) at {commits[-1][:9]} Tidy up" in shown
    assert f"since {commits[0][:9]} Start; 5 commits between them not measured: --bisect finds the one" in shown
    page = (repository.folder / "out.html").read_text()
    assert page.count("<circle") == 2
    assert "Tidy up" in page

    repository.write("model.py", "the user is in the middle of a change\n")
    found = repository.vram("history", "--bisect", TEST)
    assert f"{commits[2][:9]}       n/a  skipped: " in found or commits[2][:9] not in found
    assert f"grew from 100 MiB to 140 MiB at {commits[4][:7]} Keep the logits in fp32 (Ann, " in found
    assert (repository.folder / "model.py").read_text() == "the user is in the middle of a change\n"
    assert repository.git("worktree", "list").count("\n") == 0, "the worktree is gone"
    assert "bisect" not in repository.git("status")


def test_commits_that_cannot_be_measured_are_all_named(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    good = repository.commit("Good", 100)
    repository.write("model.py", "import no_such_module\n")
    repository.commit("Broken")
    bad = repository.commit("Bad", 200)
    found = repository.vram("history", "--bisect", TEST, "--good", good, "--bad", bad, "--gpu", "cuda")
    assert "skipped: pytest ended with exit code" in found
    assert "grew from 100 MiB to 200 MiB at one of these, which could not all be measured:" in found
    assert "Broken (Ann," in found
    assert "Bad (Ann," in found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["history", "nowhere"], "history nowhere is not there: `pytest --vram-history=nowhere` begins one"),
        (["history", "empty"], "history empty has no session"),
        (["history", "broken"], "cannot be read: "),
        (["history", "newer"], "is of version 99, and this pytest-vram reads 1"),
        (["history", "--test", "nothing"], f"no test of the history has such a name; it has {TEST}"),
        (["history", "-o", "x.pdf"], "it is a page; name it x.html"),
        (["history", "--bisect", "nothing"], f"has no such test; it has {TEST}"),
        (["history", "--bisect", TEST, "--good", "HEAD", "--bad", "HEAD~1"], "is not an ancestor of --bad"),
        (["history", "--bisect", TEST, "--good", "nope"], "nope"),
        (["history", "--bisect", TEST, "--good", "HEAD~1", "--bad", "HEAD", "--tolerance", "900"], "did not grow by"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line(
    grown: tuple[Repository, list[str]],
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    repository, _ = grown
    for name, text in (("broken", "{"), ("newer", '{"vram_history": 99}\n')):
        repository.write(f"{name}/a.jsonl", text)
    (repository.folder / "empty").mkdir(exist_ok=True)
    monkeypatch.chdir(repository.folder)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_dirty_tree_and_a_detached_head(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    repository.commit("One", 100)
    repository.git("checkout", "-q", "--detach")
    assert "uncommitted" not in repository.pytest(RECORD)
    repository.needs(200)
    assert "the tree has uncommitted changes" in repository.pytest(RECORD)
    shown = repository.vram("history")
    assert "100 MiB, 1 commit" in shown
    assert "note: 1 session measured uncommitted changes: left out, --all shows them" in shown
    assert "+changes" in repository.vram("history", "--all")
    tops = [json.loads(p.read_text().splitlines()[0]) for p in (tmp_path / "vram-history").iterdir()]
    assert [top.get("branch") for top in tops] == [None, None]


def test_a_shallow_clone_follows_the_dates(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "origin")
    for size in (100, 200):
        repository.commit(f"{size} MB", size)
        repository.pytest(RECORD)
    repository.commit("The history")
    subprocess.run(
        ["git", "clone", "-q", "--depth=1", (tmp_path / "origin").as_uri(), str(tmp_path / "clone")],
        env=ENVIRONMENT,
        check=True,
    )
    clone = Repository.__new__(Repository)
    clone.folder = tmp_path / "clone"
    shown = clone.vram("history")
    assert "the commits are in the order of their dates: the clone is shallow" in shown
    assert "grew +100.0%" in shown


def test_branches_that_carry_their_history_merge_and_sessions_at_once_keep_both(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    repository.commit("One", 100)
    repository.git("branch", "other")
    for branch, sessions in (("main", 2), ("other", 1)):
        repository.git("checkout", "-q", branch)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: repository.pytest(RECORD), range(sessions)))
        repository.commit(f"History of {branch}")
    repository.git("merge", "-q", "--no-edit", "main")
    assert len(list((tmp_path / "vram-history").glob("*.jsonl"))) == 3
    assert "1 commit" in repository.vram("history")


def test_without_git_and_with_workers(project: Project) -> None:
    project.write("@pytest.mark.parametrize('n', [1, 2, 3])\ndef test(n):\n    alloc(n * MB)")
    result = project.run("-n2", "--vram-history=h", plugins=("xdist",))
    result.stdout.fnmatch_lines(["*3 peaks added to the history:*", "*does not know the commit of this session: *"])
    (path,) = (project.pytester.path / "h").glob("*.jsonl")
    top, *entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert top.get("commit") is None
    assert sorted(entry["peak_bytes"] for entry in entries) == [2**20, 2 * 2**20, 3 * 2**20]


def test_a_session_that_measures_nothing_adds_nothing_and_a_file_is_refused(project: Project) -> None:
    project.write("def test(): pass")
    project.run("--vram-history=h", "-p", "no:terminal")
    assert not (project.pytester.path / "h").exists()
    (project.pytester.path / "file").write_text("")
    result = project.run("--vram-history=file")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--vram-history=*file: this is a file; name a folder*"])
