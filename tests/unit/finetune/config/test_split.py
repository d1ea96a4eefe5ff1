"""The flags of the split: rows of a step, rows of a micro-batch, and who chooses the latter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from finetune import cli
from finetune.config import yaml_file
from finetune.config.settings import RunConfig, TrainConfig
from finetune.config.split import with_batch
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

DATA = ["--model", "m", "--data", "rows.jsonl"]


def split(*flags: str) -> tuple[int, int, str]:
    train = cli.parse([*flags, *DATA]).train
    return train.micro_batch, train.accumulation, train.split


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], (1, 16, "auto")),
        (["--micro-batch", "auto"], (1, 16, "auto")),
        (["--micro_batch=auto"], (1, 16, "auto")),
        (["--micro-batch", "1"], (1, 16, "given")),
        (["--micro-batch", "4", "--accumulation", "3"], (4, 3, "given")),
        (["--accumulation", "3"], (1, 3, "auto")),
        (["--batch", "24"], (1, 24, "auto")),
        (["--batch=24", "--micro-batch=auto"], (1, 24, "auto")),
        (["--batch", "24", "--micro-batch", "8"], (8, 3, "given")),
        (["--micro-batch", "auto", "--split", "auto"], (1, 16, "auto")),
    ],
)
def test_flags(flags: list[str], expected: tuple[int, int, str]) -> None:
    assert split(*flags) == expected


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("micro_batch: auto\nbatch: 8\n", [], (1, 8, "auto")),
        ("micro_batch: 2\nbatch: 8\n", [], (2, 4, "given")),
        ("micro_batch: 2\nbatch: 8\n", ["--accumulation", "7"], (2, 7, "given")),
        ("micro_batch: 2\naccumulation: 3\n", ["--micro-batch", "auto"], (2, 3, "auto")),
        ("batch: 8\n", ["--batch", "32"], (1, 32, "auto")),
        ("batch: 8\naccumulation: 4\nmicro_batch: 2\n", [], (2, 4, "given")),
        ("split: given\n", ["--micro-batch", "auto"], (1, 16, "auto")),
    ],
)
def test_a_file_and_flags_over_it(text: str, flags: list[str], expected: tuple[int, int, str], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert split(str(file), *flags) == expected


@pytest.mark.parametrize(
    ("flags", "field", "remedy"),
    [
        (["--batch", "24", "--micro-batch", "7"], "micro_batch", "--micro-batch auto"),
        (["--batch", "24", "--accumulation", "2"], "batch", "one of the two"),
        (["--batch", "0"], "batch", "1 or more"),
        (["--micro-batch", "auto", "--split", "given"], "micro_batch", "one of the two"),
        (["--split=given", "--micro_batch=auto"], "micro_batch", "one of the two"),
    ],
)
def test_what_cannot_be_split_is_refused(flags: list[str], field: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as raised:
        cli.parse([*flags, *DATA])
    (problem,) = raised.value.problems
    assert problem.field == field
    assert remedy in problem.remedy


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("batch: 24\naccumulation: 2\n", "batch"),
        ("batch: 24\naccumulation: 2\nmicro_batch: 4\n", "batch"),
        ("batch: 24\naccumulation: 2\nmicro_batch: auto\n", "batch"),
        ("micro_batch: auto\nsplit: given\n", "micro_batch"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(text: str, field: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        cli.parse([str(file), *DATA])
    (problem,) = raised.value.problems
    assert (problem.field, problem.remedy) == (field, "give one of the two")


def test_an_accumulation_in_a_file_overrides_a_recorded_batch(tmp_path: Path) -> None:
    recorded = cli.parse(["--batch", "24", *DATA, "--output", str(tmp_path)])
    (tmp_path / "config.yaml").write_text(yaml_file.dump(recorded))
    file = tmp_path / "run.yaml"
    file.write_text("accumulation: 3\n")
    train = cli.parse([str(file), "--output", str(tmp_path), "--resume"]).train
    assert (train.batch, train.micro_batch, train.accumulation) == (None, 1, 3)


def test_a_written_file_is_read_back_as_it_was(tmp_path: Path) -> None:
    for train in (TrainConfig(), TrainConfig(micro_batch=4, split="given"), TrainConfig(batch=24)):
        config = with_batch(yaml_file.replace(RunConfig(), {"batch": train.batch, "split": train.split}))
        config = yaml_file.replace(config, {"micro_batch": train.micro_batch})
        file = tmp_path / "config.yaml"
        file.write_text(yaml_file.dump(config))
        assert yaml_file.replace(RunConfig(), yaml_file.load(file)).train == config.train
