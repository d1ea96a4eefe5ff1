"""The command ``finetune.qlora``: its exit codes, the lock that it holds while it runs, and its arguments."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import sys
import types
from typing import TYPE_CHECKING, Any

import pytest

from finetune import qlora
from finetune.config import yaml_file
from finetune.config.settings import RunConfig
from finetune.errors import (
    DataError,
    ExitCode,
    OutOfMemoryError,
    OutputError,
    RunInterruptedError,
    TrainingError,
    WriteError,
)
from finetune.training import loop, prepare, result, sharded

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return yaml_file.replace(RunConfig(), {"output": tmp_path / "run", "data": "rows.jsonl"})


class Steps:
    """Takes the place of the work; ``prepare``, ``fit`` and ``write_result`` do what is asked of them here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **does: Any) -> None:
        does = {"prepare": lambda *_: types.SimpleNamespace(model=None)} | does
        monkeypatch.setattr(sharded, "whole_model", lambda _: None)
        for module, name in ((prepare, "prepare"), (loop, "fit"), (result, "write_result")):
            monkeypatch.setattr(module, name, does.get(name, lambda *_, name=name: name))


def raises(error: BaseException) -> Any:
    def step(*_: Any) -> None:
        raise error

    return step


def interrupted(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("the signal was not heard")


@pytest.mark.parametrize("step", ["prepare", "fit", "write_result"])
def test_memory_that_runs_out_is_explained_in_every_step(
    monkeypatch: pytest.MonkeyPatch, config: RunConfig, step: str
) -> None:
    Steps(monkeypatch, **{step: raises(MemoryError())})
    with pytest.raises(OutOfMemoryError, match="--resume"):
        qlora.run(config)


@pytest.mark.parametrize("step", ["prepare", "write_result"])
def test_a_signal_outside_the_loop_stops_the_run_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, config: RunConfig, step: str
) -> None:
    Steps(monkeypatch, **{step: interrupted})
    with pytest.raises(RunInterruptedError, match="--resume"):
        qlora.run(config)


def test_the_folder_is_held_while_the_run_lasts(monkeypatch: pytest.MonkeyPatch, config: RunConfig) -> None:
    def second(*_: Any) -> None:
        with pytest.raises(OutputError, match=f"another run is writing there .process {os.getpid()}"):
            qlora.run(config)

    Steps(monkeypatch, fit=second)
    assert qlora.run(config) == "write_result"
    Steps(monkeypatch)
    assert qlora.run(config) == "write_result"  # and is free afterwards


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("rows.jsonl:3: no text"), 2),
        (OutOfMemoryError("none left", budget_bytes=1, held_bytes=1), 3),
        (WriteError("disk full"), 4),
        (TrainingError("the loss is nan"), 5),
        (RunInterruptedError("stopped after step 3"), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_failure_is_one_message_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    monkeypatch.setattr(qlora, "run", raises(error))
    monkeypatch.setattr(qlora, "_settle_libraries", lambda: None)
    assert qlora.main(["--data", "rows.jsonl"]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (f"finetune.qlora: {error}\n" if str(error) else "")


def test_a_bug_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qlora, "run", raises(ZeroDivisionError()))
    monkeypatch.setattr(qlora, "_settle_libraries", lambda: None)
    with pytest.raises(ZeroDivisionError):
        qlora.main([])


def test_the_closing_text_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(qlora, "run", lambda config: config.data.data)
    monkeypatch.setattr(qlora, "_settle_libraries", lambda: None)
    monkeypatch.setattr(result, "report", lambda summary: f"trained on {summary}")
    assert qlora.main(["--data", "rows.jsonl"]) == ExitCode.OK
    assert capsys.readouterr().out == "trained on rows.jsonl\n"


def test_no_arguments_are_no_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["qlora", "--rank", "3", "--print-config"])
    assert qlora.main() == ExitCode.OK
    assert "\nrank: 3\n" in capsys.readouterr().out
    monkeypatch.setattr(qlora, "run", lambda config: config.adapter.rank)
    monkeypatch.setattr(qlora, "_settle_libraries", lambda: None)
    monkeypatch.setattr(result, "report", lambda rank: f"rank {rank}")
    assert qlora.main([]) == ExitCode.OK
    assert capsys.readouterr().out == "rank 8\n"  # the demo's, not that of the process's arguments


@pytest.mark.parametrize("flag", ["--dry-run", "--fit"])
def test_what_only_looks_trains_nothing(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    from finetune.dryrun import command

    monkeypatch.setattr(qlora, "run", raises(AssertionError("it trains")))
    monkeypatch.setattr(command, "main", lambda _: ExitCode.OUT_OF_MEMORY)
    assert qlora.main(["--model", "mistral-7b", flag, "--gpu", "rtx-4080"]) == 3


@pytest.mark.parametrize("flag", ["--dry-run", "--fit"])
def test_one_rank_only_takes_a_dry_run(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    from finetune.dryrun import command

    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(command, "main", raises(AssertionError("rank 1 measures too")))
    assert qlora.main(["--model", "mistral-7b", flag, "--gpu", "rtx-4080"]) == ExitCode.OK


@pytest.mark.parametrize("chosen", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_sharded_run_lets_segments_grow_unless_the_user_has_chosen(
    chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setattr(os, "environ", {chosen: "backend:native"} if chosen else {})
    qlora._let_segments_grow()
    found = {name: os.environ[name] for name in names if name in os.environ}
    assert found == {chosen or names[1]: "backend:native" if chosen else "expandable_segments:True"}


@pytest.mark.parametrize("installed", ["2.6.0", "2.6.0+cu124", "2.7.0+cu128", "2.15.0"])
def test_sharding_asks_for_a_torch_that_can(
    installed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.dryrun import command

    monkeypatch.setattr(importlib.metadata, "version", lambda _: installed)
    monkeypatch.setattr(command, "main", lambda _: ExitCode.OK)
    done = qlora.main(["--model", "mistral-7b", "--dry-run", "--gpu", "rtx-4080", "--count", "2", "--shard"])
    can = not installed.startswith("2.6")
    assert (done == ExitCode.OK) == can
    assert (f"it needs torch 2.7 or newer, and this is torch {installed}" in capsys.readouterr().err) == (not can)
