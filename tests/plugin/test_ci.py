"""The steps of action.yml run by a script, as a runner runs them; and the pre-commit hook."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from formats import SARIF, read_command

sys.path.insert(0, str(Path(__file__).parent))
from made_up_repository import ENVIRONMENT, Repository

from pytest_vram import cli

ROOT = Path(__file__).resolve().parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
PINNED = re.compile(r"[\w/-]+@[0-9a-f]{40}")
PIP = """#!/bin/sh
if [ "$2" = pip ]; then printf '%s\\n' "$@" >> "$RUNNER_TEMP/pip"; exit 0; fi
exec {python} "$@"
"""


class Runner:
    """Runs the composite steps of action.yml that are scripts; pip is not run, and what it is asked for is kept."""

    def __init__(self, repository: Repository, temporary: Path, **inputs: str) -> None:
        self.folder, self.temporary = repository.folder, temporary
        self.inputs = {name: str(entry.get("default", "")) for name, entry in ACTION["inputs"].items()} | inputs
        self.files = {name: temporary / name for name in ("GITHUB_OUTPUT", "GITHUB_ENV", "GITHUB_STEP_SUMMARY")}
        shim = temporary / "bin" / "python"
        shim.parent.mkdir(parents=True)
        shim.write_text(PIP.format(python=sys.executable))
        shim.chmod(0o755)
        self.environment = ENVIRONMENT | {name: str(path) for name, path in self.files.items()}
        self.environment |= {"RUNNER_TEMP": str(temporary), "GITHUB_WORKSPACE": str(self.folder)}
        self.environment |= {"PATH": f"{shim.parent}{os.pathsep}{os.environ['PATH']}"}
        self.outputs: dict[str, str] = {}

    def event(self, base: str) -> None:
        path = self.temporary / "event.json"
        path.write_text(json.dumps({"pull_request": {"number": 3, "base": {"sha": base, "ref": "main"}}}))
        self.environment["GITHUB_EVENT_PATH"] = str(path)

    def steps(self) -> dict[str, subprocess.CompletedProcess[str]]:
        """Run all, and return the results by name. A failed step ends those that do not ask for `!cancelled()`."""
        results: dict[str, subprocess.CompletedProcess[str]] = {}
        failed = False
        for step in ACTION["runs"]["steps"]:
            if "run" not in step or not self._wanted(step, failed):
                continue
            environment = self.environment | {k: self._filled(str(v)) for k, v in step.get("env", {}).items()}
            assert "${{" not in step["run"], "an expression inside a script could be a script of its own"
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]],
                cwd=self.folder / self._filled(step.get("working-directory", ".")),
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            results[step["name"]] = done
            failed = failed or done.returncode != 0
            self._take(step.get("id"))
        return results

    def _wanted(self, step: dict[str, Any], failed: bool) -> bool:
        condition = str(step.get("if", "success()")).removeprefix("${{").removesuffix("}}").strip()
        known = {
            "success()": not failed,
            "!cancelled()": True,
            "inputs.compare == 'true'": self.inputs["compare"] == "true",
            "github.event.pull_request": "GITHUB_EVENT_PATH" in self.environment,
        }
        return all(known[part.strip()] for part in condition.split("&&"))

    def _filled(self, text: str) -> str:
        values = {f"inputs.{name}": value for name, value in self.inputs.items()}
        values |= {f"steps.folder.outputs.{name}": value for name, value in self.outputs.items()}
        values |= {"github.action_path": str(ROOT), "github.token": "secret"}
        return re.sub(r"\$\{\{ *([\w.-]+) *\}\}", lambda match: self._filled(values[match[1]]), text)

    def _take(self, step: str | None) -> None:
        for name, into in (("GITHUB_OUTPUT", self.outputs if step else {}), ("GITHUB_ENV", self.environment)):
            text = self.files[name].read_text() if self.files[name].exists() else ""
            into.update(line.split("=", 1) for line in text.splitlines())


def test_every_action_is_pinned_to_a_commit() -> None:
    used = [step["uses"] for step in ACTION["runs"]["steps"] if "uses" in step]
    assert len(used) == 3
    assert all(PINNED.fullmatch(name) for name in used)
    assert all(step.get("shell") == "bash" for step in ACTION["runs"]["steps"] if "run" in step)


@pytest.fixture(scope="module")
def pull_request(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runner, dict[str, Any], Repository]:
    """A pull request that makes a test in a folder of the repository larger than its budget."""
    top = tmp_path_factory.mktemp("action")
    repository = Repository(top / "repository")
    base = repository.commit("Base", 100)
    repository.git("checkout", "-q", "-b", "change")
    repository.needs(200, budget=150)
    repository.write("model.py", "# a line before\n" + (repository.folder / "model.py").read_text())
    repository.commit("Change")
    runner = Runner(repository, top / "temporary", gpu="cuda", install="-r 'my requirements.txt'", comment="false")
    runner.inputs["pytest-args"] = "-k 'test_step or nothing' -p no:cacheprovider"
    runner.event(base)
    return runner, runner.steps(), repository


def test_the_steps_install_this_checkout_and_what_is_asked_for(pull_request: Any) -> None:
    runner, results, _ = pull_request
    assert results["Install"].returncode == 0, results["Install"].stdout
    asked = (runner.temporary / "pip").read_text().split("-m\npip\ninstall\n--disable-pip-version-check\n")[1:]
    assert asked == [f"{ROOT}\ntorch>=2.6\n", "-r\nmy requirements.txt\n"]
    assert runner.environment["PYTEST_VRAM_CACHE"].startswith(str(runner.temporary))


def test_a_broken_budget_fails_the_job_and_is_shown_all_the_same(pull_request: Any) -> None:
    runner, results, _ = pull_request
    assert {name: done.returncode for name, done in results.items()} == {
        "Choose folders": 0,
        "Install": 0,
        "Run the budgets": 1,
        "Measure the base": 0,
        "Show what was measured": 0,
    }, results["Show what was measured"].stdout
    commands = [
        read_command(line) for line in results["Show what was measured"].stdout.splitlines() if line.startswith("::")
    ]
    name, properties, message = commands[0]
    assert (name, properties["file"], properties["line"]) == ("error", "model.py", "6")
    assert message.startswith("test_it.py::test_step needs 200 MiB of allocated memory, 50.0 MiB more than its budget")
    summary = runner.files["GITHUB_STEP_SUMMARY"].read_text()
    assert "1 test needs more than `main`, 1 over budget" in summary
    assert "| ❌ | test\\_it.py::test\\_step | 100 MiB | 200 MiB | +100 MiB (+100.0%) | 150 MiB |" in summary


def test_lines_are_compared_where_they_are_now(pull_request: Any) -> None:
    runner, _, _ = pull_request
    comment = (Path(runner.outputs["path"]) / "comment.md").read_text()
    assert "| model.py:6 in step | 100 MiB | 200 MiB | +100 MiB |" in comment, "line 5 of the base is line 6 now"


def test_the_artifacts_are_there_and_valid(pull_request: Any) -> None:
    runner, _, repository = pull_request
    folder = Path(runner.outputs["path"])
    assert sorted(path.name for path in folder.iterdir()) == [
        *(
            "base-commit.txt",
            "base.json",
            "comment.md",
            "vram.codequality.json",
            "vram.html",
            "vram.json",
            "vram.sarif",
        ),
    ]
    jsonschema.validate(json.loads((folder / "vram.sarif").read_text()), SARIF)
    assert json.loads((folder / "vram.codequality.json").read_text())[0]["location"]["path"] == "model.py"
    assert repository.git("worktree", "list").count("\n") == 0


def test_a_base_that_cannot_be_measured_is_told_and_fails_nothing(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "repository")
    repository.commit("One", 100)
    told = repository.vram("ci", "base", "--rev", "0" * 40, "--gpu=cuda", "--into=out")
    assert read_command(told.splitlines()[0])[0] == "notice"
    assert "the clone does not have the commit" in told
    repository.vram("ci", "measure", "--into=out", "--gpu=cuda")
    assert "There is nothing to compare with" not in repository.vram("ci", "publish", "--into=out")
    assert "There is nothing to compare with: the base" in (repository.folder / "out/comment.md").read_text()
    assert "it has no folder" not in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["base"], "name a commit with --rev"),
        (["base", "--rev=x", "--gpu=rtx-1"], "there is no card"),
        (["publish"], "ci measure --into"),
        (["measure", "--pytest-args='"], "cannot be split"),
        (["hook", "--seconds=0", "a.py"], "--seconds 0: the time limit is a number of seconds above 0"),
    ],
)
def test_the_parts_tell_what_they_cannot_use(
    tmp_path: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_EVENT_PATH", raising=False)
    assert cli.main(["ci", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_session_without_a_report_is_told(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    repository.write("conftest.py", "raise SystemExit(7)")
    assert "and without a report" in repository.vram("ci", "measure", "--gpu=cuda", code=7)
    repository.write("conftest.py", "")
    repository.write("test_it.py", "def test(): pass\n")
    told = repository.vram("ci", "measure", "--gpu=cuda", "--", "-p", "no:vram", code=1)
    assert "exit code 0, and without a report: its output says why; `-p no:vram` prevents one" in told


def test_growth_fails_a_job_that_asks_for_it(pull_request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, _, repository = pull_request
    monkeypatch.chdir(repository.folder)
    for name in ("GITHUB_EVENT_PATH", "GITHUB_STEP_SUMMARY", "GITHUB_WORKSPACE"):
        monkeypatch.delenv(name, raising=False)
    publish = ["ci", "publish", f"--into={runner.outputs['path']}"]
    assert cli.main(publish) == 0
    assert cli.main([*publish, "--fail-on-growth"]) == 1
    assert cli.main([*publish, "--fail-on-growth", "--tolerance=200"]) == 0


HOOK = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())[0]


@pytest.mark.parametrize(("name", "chosen"), [("test_a.py", True), ("x/a_test.py", True), ("model.py", False)])
def test_the_hook_is_for_test_files(name: str, chosen: bool) -> None:
    assert bool(re.search(HOOK["files"], name)) is chosen


def test_the_hook_runs_budgets_alone(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    hook = [*HOOK["entry"].split()[2:], "--gpu=cuda"]
    repository.needs(100)
    repository.write("test_other.py", "def test_without_a_budget():\n    assert False\n")
    assert "budgets kept" in repository.vram(*hook[1:], "test_it.py", "test_other.py", "deleted_test.py")
    repository.vram(*hook[1:], "test_other.py")
    repository.needs(200, budget=150)
    assert "more than its budget of 150 MiB" in repository.vram(*hook[1:], "test_it.py", code=1)


def test_the_hook_ends_at_its_time_limit_with_all_its_processes(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    repository.write(
        "test_it.py",
        "import pytest, subprocess, sys, time\n@pytest.mark.vram(max_mb=1)\ndef test_slow():\n"
        f"    open('pid', 'w').write(str({child}.pid))\n    time.sleep(60)\n",
    )
    began = time.monotonic()
    told = repository.vram("ci", "hook", "--gpu=cuda", "--seconds=3", "test_it.py", code=1)
    assert "took more than 3 s and were stopped, so they are not checked" in told
    assert time.monotonic() - began < 50
    if (tmp_path / "pid").exists():
        state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
        deadline = time.monotonic() + 20
        while state.exists() and " Z " not in state.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not state.exists() or " Z " in state.read_text()
