"""The log of a run: rows are kept across a resumption, and tokens per second and the time left are right."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from finetune.disk.run_folder import RunFolder
from finetune.disk.run_log import EvalRow, RunLog, StepStats

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

STATS = StepStats(loss=2.0, targets=30, tokens=100, grad_norm=1.0, learning_rate=1e-4, seconds=2.0)


def opened(folder: Path, *, start: int = 0, total: int = 5) -> RunLog:
    return RunLog(RunFolder(folder), start_step=start, total_steps=total, tensorboard=False)


def test_a_step_is_told_with_tokens_a_second_and_the_time_that_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = opened(tmp_path)
    for step, seconds in ((1, 20.0), (2, 40.0)):
        log.step(step, replace(STATS, seconds=seconds))
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [(row["step"], row["tokens"], row["tokens_per_second"]) for row in rows] == [(1, 100, 5.0), (2, 100, 2.5)]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # few steps: each is told
    assert "step 2/5" in lines[1]
    assert "2 tokens/s" in lines[1]
    assert "1:30 left" in lines[1]  # three more of 30 s on average


def test_without_a_terminal_a_long_run_is_told_in_twenty_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = opened(tmp_path, total=200)
    for step in range(1, 201):
        log.step(step, STATS)
    log.close()
    assert len(capsys.readouterr().err.splitlines()) == 20


def test_a_resumed_run_keeps_the_rows_of_what_is_done_and_no_others(tmp_path: Path) -> None:
    log = opened(tmp_path)
    for step in (1, 2, 3):
        log.step(step, STATS)
        log.evaluation(EvalRow(step=step, loss=3.0 - step, targets=7, question="why?", answer="so"))
    log.close()
    log = opened(tmp_path, start=2)
    kept = log.evaluations()
    log.close()
    assert kept == [EvalRow(step=s, loss=3.0 - s, targets=7, question="why?", answer="so") for s in (1, 2)]
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 2


def test_a_run_without_held_out_rows_has_evaluations_without_a_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = opened(tmp_path)
    log.evaluation(EvalRow(step=0, loss=None, targets=0, question="why?", answer="so"))
    assert [row.answer for row in log.evaluations()] == ["so"]
    log.close()
    assert "held-out" not in capsys.readouterr().err


def test_both_files_are_on_the_disk_before_a_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = opened(tmp_path)
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(os.readlink(f"/proc/self/fd/{number}")))
    log.sync()
    monkeypatch.undo()
    log.close()
    assert {os.path.basename(path) for path in flushed} == {"train.jsonl", "eval.jsonl"}
