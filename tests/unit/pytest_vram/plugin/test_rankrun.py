"""Which rank is told as the first that failed, and how one ended that left no result."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram.errors import VramRankFailed
from pytest_vram.plugin import rankrun
from pytest_vram.plugin.rank_messages import RankRequest
from pytest_vram.plugin.rankchild import RankChild

if TYPE_CHECKING:
    from pathlib import Path

EXITS = "import os; os._exit(0)"
IS_KILLED = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
WAITS = "import time; time.sleep(60)"


def told(monkeypatch: pytest.MonkeyPatch, folder: Path, *programs: str, timeout: float = 60) -> str:
    """The message about ranks that run these programs."""
    monkeypatch.setattr(rankrun, "_GRACE", 0.1)
    started = []
    for rank, program in enumerate(programs):
        (folder / f"{rank}.out").write_text("")
        command = [sys.executable, "-S", "-c", program]
        started.append(subprocess.Popen(command, cwd=folder, start_new_session=True))
    ends = rankrun._wait(started, folder, timeout)
    assert all(process.poll() is not None for process in started)
    with pytest.raises(VramRankFailed) as caught:
        rankrun._judge(started, folder, rankrun.Ranks(count=len(programs), timeout=timeout), ends)
    return str(caught.value)


def test_a_rank_that_exits_with_code_0_and_no_result_ends_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = told(monkeypatch, tmp_path, WAITS, EXITS)
    assert text.startswith("rank 1 of 2 ended with exit code 0 before its test did:\nit printed nothing")
    assert "the other ranks:\n  rank 0 was ended because of it" in text


def test_a_killed_rank_is_told_before_one_that_fails_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = {"outcome": "failed", "when": "call", "text": "connection reset", "time": time.monotonic() + 60}
    fails = f"import pathlib; pathlib.Path('0.json').write_text({json.dumps(result)!r})"
    text = told(monkeypatch, tmp_path, fails, IS_KILLED)
    assert text.startswith("rank 1 of 2 was killed by signal 9 (SIGKILL), ")
    assert "before its test did:" in text
    assert "rank 0 failed" in text


def test_a_failure_is_told_before_ranks_that_die_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = {"outcome": "failed", "when": "call", "text": "the loss is negative", "time": time.monotonic() - 60}
    (tmp_path / "0.json").write_text(json.dumps(result))
    text = told(monkeypatch, tmp_path, "", IS_KILLED)
    assert text.startswith("rank 0 of 2 failed first, in its call:\nthe loss is negative")


def test_a_failure_is_told_before_a_rank_that_dies_of_it_at_the_same_look(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both happen between two looks at the ranks, of which the first sees neither."""
    sleep = time.sleep
    monkeypatch.setattr(rankrun.time, "sleep", lambda _: sleep(2))
    fails = "{'outcome': 'failed', 'when': 'call', 'text': 'the loss is negative', 'time': time.monotonic()}"
    second = f"import json, pathlib, time; pathlib.Path('1.json').write_text(json.dumps({fails}))"
    first = "import os, time\nwhile not os.path.exists('1.json'): time.sleep(0.01)\ntime.sleep(0.2)\nos.abort()"
    text = told(monkeypatch, tmp_path, first, second)
    assert text.startswith("rank 1 of 2 failed first, in its call:\nthe loss is negative")
    assert "rank 0 was killed by signal 6 (SIGABRT), because native code gave up" in text


def test_a_late_rank_is_told_with_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = told(monkeypatch, tmp_path, WAITS, timeout=0.2)
    assert text.startswith("rank 0 of 1 did not end within 0.2 s:")


def test_a_message_that_utf_8_cannot_hold_is_escaped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "0")
    child = RankChild(
        RankRequest(test="test_it.py::test_it", options={}, folder=tmp_path, figures=None, backend=None, timeout=1.0)
    )
    report: Any = SimpleNamespace(
        failed=True, skipped=False, when="call", outcome="failed", longreprtext="half \udc80", sections=[]
    )
    child.pytest_runtest_logreport(report)
    assert json.loads((tmp_path / "0.json").read_text())["text"] == "half \\udc80"
