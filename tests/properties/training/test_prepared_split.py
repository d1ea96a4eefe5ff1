"""The split that a run chooses: it is the run's, and config.yaml keeps the settings that were asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tiny_models import tiny_model
from tiny_tokenizers import tiny_tokenizer

from finetune import cli, launch
from finetune.config import yaml_file
from finetune.errors import ConfigError
from finetune.qlora import run
from finetune.training import prepare, ranks
from finetune.training.oom import Holdings
from finetune.training.split import Split

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.config.settings import RunConfig


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    tokenizer, model = tiny_tokenizer(), tmp_path / "model"
    tokenizer.save_pretrained(model)
    tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "one", "completion": "two"}\n' * 12)
    words = f"--model {model} --data {rows} --output {tmp_path / 'run'} --device cpu --schedule constant --seq 32"
    return [*words.split(), "--precision", "fp32", "--accumulation", "4", "--answer-tokens", "0"]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Let a run on a CPU choose micro-batches of 2, and return the settings that it goes on with."""
    found: list[RunConfig] = []

    def choose(model: Any, train: Any, config: RunConfig) -> Split:
        found.append(yaml_file.replace(config, {"micro_batch": 2, "accumulation": 2}))
        return Split(config=found[-1])

    monkeypatch.setattr(prepare, "chosen_split", choose)
    return found


@pytest.mark.usefixtures("chosen")
def test_the_same_command_resumes_a_run_again_and_again(flags: list[str]) -> None:
    run(cli.parse([*flags, "--max-steps", "1"]))
    for steps in ("2", "3"):
        config = cli.parse([*flags, "--resume", "--max-steps", steps])
        assert (config.train.micro_batch, config.train.accumulation) == (1, 4)
        summary = run(config)
        assert summary is not None
        recorded = yaml_file.load(config.output.output / "config.yaml")
        assert (recorded["micro_batch"], recorded["accumulation"], recorded["split"]) == (1, 4, "auto")
    run(cli.parse([*flags, "--overwrite", "--max-steps", "1"]))
    assert yaml_file.load(config.output.output / "config.yaml")["micro_batch"] == 1


def test_an_out_of_memory_failure_is_explained_with_the_chosen_split(flags: list[str], chosen: list[RunConfig]) -> None:
    holdings, config = Holdings(), cli.parse([*flags, "--max-steps", "1"])
    config.output.output.mkdir()
    setup = prepare.prepare(config, holdings)
    assert holdings.config is setup.config is chosen[0]


@pytest.mark.usefixtures("chosen")
def test_a_recorded_split_that_leaves_ranks_idle_is_refused(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run(cli.parse([*flags, "--max-steps", "1"]))
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert launch.size() == 3
    config = cli.parse([*flags, "--resume", "--max-steps", "2"])
    ranks.require_shares(config)  # 4 micro-batches of one row would do
    with pytest.raises(ConfigError, match="a step has only 2"):
        prepare.prepare(config, Holdings())
