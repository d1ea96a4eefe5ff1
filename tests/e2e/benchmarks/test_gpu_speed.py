"""benchmarks/gpu_speed.py tells why a recipe failed, goes on with the others, and leaves no process behind."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_speed  # noqa: E402 - its folder is put on the path above

SPAWNS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(600)
"""
"""As ``python -m pytest_vram run`` has the program in a process of its own."""


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def gone_soon(pid: int) -> bool:
    return any(not is_alive(pid) or time.sleep(0.1) for _ in range(100))


@pytest.fixture
def arguments(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        recipes=["trainer", "ours"],
        settings=["smollm2-135m:64:1:1"],
        steps=7,
        dry=None,
        profile=None,
        json=tmp_path / "out.json",
        timeout=60.0,
    )


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_run_that_takes_too_long_ends_with_all_its_processes(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_speed.run([sys.executable, "-c", SPAWNS, str(told)], 3.0)
    assert gone_soon(int(told.read_text()))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_benchmark_that_is_stopped_keeps_what_it_measured_and_ends_what_runs(tmp_path: Path) -> None:
    told, script, saved = tmp_path / "pid", tmp_path / "speed_step.py", tmp_path / "out.json"
    script.write_text(SPAWNS.replace("sys.argv[1]", repr(str(told))))
    program = f"import sys, pathlib; sys.path.insert(0, {str(BENCHMARKS)!r}); import gpu_speed; "
    program += f"gpu_speed.HERE = pathlib.Path({str(tmp_path)!r}); raise SystemExit(gpu_speed.main())"
    flags = ["--recipes", "ours", "--settings", "smollm2-135m:64:1:1", "--json", str(saved)]
    with subprocess.Popen([sys.executable, "-c", program, *flags], stderr=subprocess.PIPE, text=True) as process:
        for _ in range(300):
            if told.exists() and told.read_text():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"stopped; 0 results are in {saved}" in errors
    assert json.loads(saved.read_text()) == []
    assert gone_soon(int(told.read_text()))


def test_a_recipe_that_fails_stops_no_other_and_is_saved(
    arguments: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["Traceback (most recent call last):", '  raise Error("x")', "torch.OutOfMemoryError: CUDA out of memory."]
    answers = iter([(1, lines), (-9, [])])
    monkeypatch.setattr(gpu_speed, "run", lambda command, seconds: next(answers))
    results: list[dict[str, Any]] = []
    gpu_speed.measure(arguments, results)
    assert [found["recipe"] for found in results] == ["trainer", "ours"]
    printed = capsys.readouterr().out
    assert "trainer    out of memory: this recipe needs more than the card has" in printed
    assert "ours       ended by SIGKILL" in printed
    assert json.loads(arguments.json.read_text()) == results
    assert results[0]["stderr"] == lines
    assert os.listdir(arguments.json.parent) == ["out.json"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ["ValueError: first", "during which", "unsloth.UnslothError: no GPU", "sys:1: warning"],
            "unsloth.UnslothError",
        ),
        (["KeyboardInterrupt"], "KeyboardInterrupt"),
        (["the last word"], "the last word"),
        ([], "ended with exit code 1"),
    ],
)
def test_the_reason_of_a_failure_is_the_last_error(lines: list[str], expected: str) -> None:
    assert gpu_speed.reason(1, lines).startswith(expected)
