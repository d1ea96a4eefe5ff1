"""Which data a dry run reads, and when it reads none."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from finetune.config import yaml_file
from finetune.config.settings import RunConfig
from finetune.dryrun import trial_data
from finetune.errors import DataError, ModelError

if TYPE_CHECKING:
    from pathlib import Path


class Tokenizer:
    """Knows no word; tells how it was asked for."""

    def __len__(self) -> int:
        return 9


def config(**settings: Any) -> RunConfig:
    return yaml_file.replace(RunConfig(), settings)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models whose tokenizers were loaded."""
    names: list[str] = []

    def load(model: Any) -> Tokenizer:
        names.append(model.model)
        if model.model == "nothing-here":
            raise ModelError("none")
        return Tokenizer()

    monkeypatch.setattr(trial_data, "load_tokenizer", load)
    return names


def test_a_shape_and_the_embedded_model_have_no_tokenizer_at_hand(loaded: list[str]) -> None:
    assert trial_data.tokenizer_of(config(model="mistral-7b")) is None
    assert trial_data.tokenizer_of(config(model="smollm2-135m")) is None
    assert loaded == []
    assert trial_data.tokenizer_of(config(model="nothing-here")) is None
    assert len(trial_data.tokenizer_of(config(model="./mine"))) == 9
    assert loaded == ["nothing-here", "./mine"]


def test_rows_are_held_against_the_model_where_they_are_files_here(
    loaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Any] = []
    monkeypatch.setattr(trial_data, "load_examples", lambda data, tokenizer, seed: (data.data, seed))
    monkeypatch.setattr(trial_data, "tables_of", lambda model: f"tables of {model}")
    monkeypatch.setattr(trial_data, "check_tables", lambda *arguments: held.append(arguments[:2]))
    rows = tmp_path / "a.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    model: Any = "model"
    trial_data.check_rows(config(model="./mine", data=str(rows), seed=3), model)
    assert held == [("tables of model", (str(rows), 3))]
    for other in (
        {"data": "docstrings"},
        {"data": str(rows), "eval_data": "hub/rows"},
        {"data": str(tmp_path / "b.jsonl")},
    ):
        trial_data.check_rows(config(model="./mine", **other), model)
    for name in ("mistral-7b", "nothing-here"):
        trial_data.check_rows(config(model=name, data=str(rows)), model)
    assert len(held) == 1


def test_a_row_that_is_refused_is_told_by_the_dry_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from finetune.dryrun import command, trial_process

    class Bench:
        def __init__(self, *_: object) -> None:
            self.refused, self.base = None, None

    def refuse(*_: object) -> None:
        raise DataError("a.jsonl:3: a token")

    def here(request: Path, *_: object) -> tuple[list[Path], str]:
        result = request.with_name("result.json")
        trial_process.main(request, result)
        return [result], ""

    monkeypatch.setattr(trial_process, "Bench", Bench)
    monkeypatch.setattr(trial_process, "check_rows", refuse)
    monkeypatch.setattr(command, "_environment", lambda *_: {})
    monkeypatch.setattr(command, "run_ranks", here)
    with pytest.raises(DataError, match=r"a\.jsonl:3: a token"):
        command.trials(config(model="./mine"), [{}], "rtx-4080")
