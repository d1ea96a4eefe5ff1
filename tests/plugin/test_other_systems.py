"""Budgets on CPU tensors, reports and commands where Python lacks what only Linux or only POSIX has.

The system is simulated: the functions and modules are taken away, and ``sys.platform`` is changed, and text
files are ASCII unless their encoding is given. torch itself stays that of Linux.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

SESSION = """
import os, signal, sys, time
import pytest, torch

system = sys.argv[1]
absent = {os: ["sched_getaffinity"], time: ["CLOCK_BOOTTIME"], signal: []}
if system == "win32":
    absent[os] += ["sysconf", "fork", "register_at_fork", "mkfifo", "killpg", "getpgrp", "tcgetpgrp"]
    absent[time] += ["clock_gettime"]
    absent[signal] += ["SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGKILL"]
    sys.modules["fcntl"] = sys.modules["resource"] = None
for module, names in absent.items():
    for name in names:
        delattr(module, name)
listed = os.listdir
def listdir(path="."):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", path)
    return listed(path)
os.listdir = listdir
assert not any(name.startswith("pytest_vram") for name in sys.modules)
sys.platform = system

arguments = ["-s", "-rs", "-p", "no:cacheprovider", "-p", "pytest_vram.plugin", "--vram-report"]
code = pytest.main([*arguments, *(f"--vram-output=r.{suffix}" for suffix in ("json", "md", "csv", "html"))])
print("SESSION", int(code))
from pytest_vram.cli import main
for command in (["report", "r.json"], ["compare", "r.json", "r.json"], ["cards"],
                ["run", "--gpu", "l4", "--", "-c", "pass"]):
    print("COMMAND", command[0], main(command), flush=True)
"""
TESTS = """
import pytest, torch

@pytest.fixture
def held():
    return torch.ones(2**18)

@pytest.mark.vram(max_mb=3)
def test_within(held, vram, gpu):
    with vram.measure("product"):
        torch.ones(2**18) * held
    assert vram["product"].allocated == 3 * 2**20
    assert gpu.kind == "host"

@pytest.mark.vram(max_mb=1)
@pytest.mark.parametrize("schlüssel", ["ä"])
def test_größer(schlüssel): torch.ones(2**17)

@pytest.mark.vram(max_mb=1)
def test_over(): torch.ones(2**19)

@pytest.mark.vram(max_host_gb=1)
def test_host(): pass

@pytest.mark.vram_ranks(2)
@pytest.mark.vram(max_mb=1)
def test_ranks(): pass
"""


@pytest.fixture(scope="module", params=["darwin", "win32"])
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp(request.param)
    # Ranks are processes of their own, which Windows cannot end: there the test is skipped. On macOS they are real.
    tests = TESTS if request.param == "win32" else TESTS.partition("@pytest.mark.vram_ranks")[0]
    (folder / "test_it.py").write_text(tests, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", SESSION, request.param],
        cwd=folder,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTEST_ADDOPTS": "",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "LC_ALL": "C",
            "PYTHONCOERCECLOCALE": "0",
            "PYTHONUTF8": "0",
            "PYTHONIOENCODING": "utf-8",
        },
    )
    return request.param, folder, done.stdout + done.stderr


def test_budgets_are_held_on_cpu_tensors(session: Any) -> None:
    system, folder, text = session
    assert "SESSION 1" in text, text
    assert "dry GPU" not in text.partition("SESSION")[0]
    tests = {
        t["nodeid"].partition("::")[2]: t for t in json.loads((folder / "r.json").read_text(encoding="utf-8"))["tests"]
    }
    assert tests["test_within"]["outcome"] == "passed"
    assert tests["test_within"]["measurements"][0]["device"]["kind"] == "host"
    assert tests["test_over"]["verdict"] == {"verdict": "exceeded", "over_bytes": 2**20}
    assert "test_it.py:20 in test_over" in text
    assert tests["test_host"]["outcome"] == "skipped"
    assert f"this is {system}" in text
    if system == "win32":
        assert tests["test_ranks"]["outcome"] == "skipped"
        assert "vram_ranks ends late ranks by their process group" in text


def test_reports_and_commands_work(session: Any) -> None:
    _, folder, text = session
    assert (folder / "r.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "## GPU memory" in (folder / "r.md").read_text(encoding="utf-8")
    assert (folder / "r.csv").read_text(encoding="utf-8").startswith("nodeid,")
    assert "COMMAND report 0" in text, text
    assert "COMMAND compare 0" in text
    assert "COMMAND cards 0" in text


def test_what_is_linux_only_says_so(session: Any) -> None:
    system, _, text = session
    assert f"the dry GPU needs Linux, for it stands in for Linux's CUDA libraries; this is {system}" in text
    assert "COMMAND run 2" in text
