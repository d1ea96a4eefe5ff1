"""Details of settings, signals and resumption that planted bugs (``tests/mutation.py``) once broke unnoticed."""

from __future__ import annotations

import dataclasses
import signal
from typing import TYPE_CHECKING

import pytest

from finetune import cli
from finetune.config import yaml_file
from finetune.config.settings import DryRunConfig, RunConfig
from finetune.disk.resume import check_settings
from finetune.disk.run_folder import RunFolder
from finetune.errors import ConfigError
from finetune.training.stop import Stop

if TYPE_CHECKING:
    from pathlib import Path


def test_a_whole_number_in_a_file_is_a_float_where_one_is_meant(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("alpha: 16\n")
    assert type(yaml_file.load(file)["alpha"]) is float


def test_what_only_looks_is_not_written_down() -> None:
    text = yaml_file.dump(RunConfig())
    assert not any(f"\n{field.name}:" in text for field in dataclasses.fields(DryRunConfig))


def test_a_moved_run_is_resumed_where_it_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = cli.parse([]).output.output
    here.mkdir(parents=True)
    RunFolder(here).config.write_text(yaml_file.dump(cli.parse(["--output", "where/it/was"])))
    resumed = cli.parse(["--resume"])
    assert resumed.output.output == here
    assert resumed.output.resume


def test_a_longer_run_with_a_constant_rate_may_change_nothing_else() -> None:
    before = yaml_file.json_values(cli.parse(["--schedule", "constant", "--max-steps", "5"]))
    longer = yaml_file.json_values(cli.parse(["--schedule", "constant", "--max-steps", "9"]))
    assert check_settings(before, longer) == []
    another = yaml_file.json_values(cli.parse(["--schedule", "constant", "--max-steps", "9", "--rank", "3"]))
    with pytest.raises(ConfigError, match="rank = 3"):
        check_settings(before, another)


def test_both_signals_are_listened_to_and_given_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with Stop().listening():
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
    assert all(signal.getsignal(number) == handler for number, handler in before.items())
