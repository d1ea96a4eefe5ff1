"""The result of a run: the figures of the right steps, a model card that loads it, and complete folders."""

from __future__ import annotations

import json
import types
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from finetune.config import yaml_file
from finetune.config.settings import RunConfig
from finetune.disk.durable import Lines
from finetune.disk.run_log import EvalRow
from finetune.training import result
from finetune.training.card import model_card
from finetune.training.result import report, write_result

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.training.prepare import Setup

ROWS = [
    {"step": 1, "loss": 3.0, "tokens": 100, "targets": 40, "seconds": 4.0},
    {"step": 2, "loss": 2.0, "tokens": 140, "targets": 60, "seconds": 2.0},
]


class Model(torch.nn.Module):
    """Five frozen numbers and three trained ones, saved as peft saves."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = torch.nn.Parameter(torch.zeros(5), requires_grad=False)
        self.lora = torch.nn.Parameter(torch.zeros(3))

    def save_pretrained(self, folder: Path, state_dict: object = None) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"0" * 2**20)
        (folder / "adapter_config.json").write_text(json.dumps({"target_modules": ["v_proj", "k_proj", "q_proj"]}))


def save_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def setup(output: Path, **settings: Any) -> Setup:
    lines = Lines(output / "train.jsonl", keep=0)
    for row in ROWS:
        lines.append(row)
    lines.close()
    made: Any = types.SimpleNamespace(
        config=yaml_file.replace(
            RunConfig(), {"model": "mistral-7b", "data": "rows.jsonl", "output": output} | settings
        ),
        model=Model(),
        tokenizer=types.SimpleNamespace(save_pretrained=save_tokenizer),
        total_steps=2,
        layers=("adapter on q_proj (2)", "no adapter on lm_head: the head"),
        facts=types.SimpleNamespace(device="cpu", threads=1, versions={"torch": "2.14"}),
    )
    return made


EVALUATIONS = [
    EvalRow(step=0, loss=4.0, targets=9, question="2 and 2?", answer="five"),
    EvalRow(step=1, loss=3.5, targets=9),
    EvalRow(step=2, loss=3.0, targets=9, question="2 and 2?", answer="four"),
]


def test_the_figures_are_those_of_the_whole_run(tmp_path: Path) -> None:
    summary = write_result(setup(tmp_path), EVALUATIONS)
    assert (summary.steps, summary.tokens, summary.targets) == (2, 240, 100)
    assert (summary.train_seconds, summary.tokens_per_second, summary.train_loss) == (6.0, 40.0, 2.0)
    assert (summary.held_out_loss_before, summary.held_out_loss_after, summary.held_out_targets) == (4.0, 3.0, 9)
    assert (summary.question, summary.answer_before, summary.answer_after) == ("2 and 2?", "five", "four")
    assert (summary.trained_parameters, summary.adapter_bytes) == (3, 2**20)
    assert (summary.merged, summary.merged_into) == (None, None)
    kept = json.loads((tmp_path / "summary.json").read_text())
    assert kept["tokens_per_second"] == 40.0
    assert kept["settings"]["model"] == "mistral-7b"


def test_an_evaluation_of_an_earlier_step_is_not_the_last_ones(tmp_path: Path) -> None:
    summary = write_result(setup(tmp_path), EVALUATIONS[:2])
    assert (summary.held_out_loss_before, summary.held_out_loss_after) == (4.0, None)
    assert "held-out loss" not in report(summary)


def test_adapter_tokenizer_and_card_lie_together_with_the_targets_in_order(tmp_path: Path) -> None:
    summary = write_result(setup(tmp_path), EVALUATIONS)
    folder = tmp_path / "adapter"
    assert summary.adapter == str(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert targets == ["k_proj", "q_proj", "v_proj"]
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: peft\n")


def test_a_model_that_is_trained_whole_is_called_model(tmp_path: Path) -> None:
    summary = write_result(setup(tmp_path, full=True, precision="bf16"), EVALUATIONS)
    assert summary.adapter == str(tmp_path / "model")
    assert not (tmp_path / "adapter").exists()
    assert (tmp_path / "model" / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")


def test_a_merged_model_lies_beside_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def merge(_: Any, adapter: Path, __: Any, folder: Path) -> None:
        assert (adapter / "adapter_model.safetensors").is_file()
        (folder / "model.safetensors").write_bytes(b"1")

    monkeypatch.setattr(result, "merge", merge)
    summary = write_result(setup(tmp_path, merge="full-base"), EVALUATIONS)
    assert (summary.merged, summary.merged_into) == (str(tmp_path / "merged"), "full-base")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        "README.md",
        "model.safetensors",
        "tokenizer.json",
    }
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert "merged model" in report(summary)


def test_the_closing_text_has_the_change_of_the_loss_and_the_speed(tmp_path: Path) -> None:
    text = report(write_result(setup(tmp_path), EVALUATIONS))
    assert "4.0000 before, 3.0000 after (-25.0 %), on 9 answer tokens" in text
    assert "2 steps, 240 tokens in 0:06: 40 tokens/s" in text
    assert "(1.0 MiB)" in text
    for words in ("question       2 and 2?", "  before       five", "  after        four"):
        assert words in text


def card(tmp_path: Path, *, merged: bool = False, **settings: Any) -> str:
    made = setup(tmp_path, **settings)
    summary = result._summarize(made, EVALUATIONS, tmp_path / "adapter", 1)
    return model_card(summary, made.config, merged=merged)


def test_the_card_has_the_figures_and_both_answers(tmp_path: Path) -> None:
    text = card(tmp_path)
    assert "| held-out loss before | 4.0000 nats a token |" in text
    assert "| held-out loss after | 3.0000 nats a token |" in text
    assert "**Before:** five" in text
    assert "**After:** four" in text
    assert "| tokens | 240 (100 with loss) |" in text
    assert "* `no adapter on lm_head: the head`" in text


def test_the_cards_settings_give_the_run_again(tmp_path: Path) -> None:
    text = card(tmp_path, rank=5)
    settings = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert settings["rank"] == 5
    assert settings["data"] == "rows.jsonl"


@pytest.mark.parametrize(
    ("model", "named"),
    [("mistralai/Mistral-7B-v0.1", True), ("mistral-7b", False), ("./a/b", False), ("/a/b", False), ("a/b/c", False)],
)
def test_only_a_name_of_the_hub_is_linked_as_the_base(tmp_path: Path, model: str, named: bool) -> None:
    assert (f"base_model: {model}\n" in card(tmp_path, model=model)) == named


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_card_loads_the_base_that_was_trained_on(tmp_path: Path, double_quant: bool) -> None:
    text = card(tmp_path, precision="fp4", double_quant=double_quant)
    assert f"ModelConfig(model='mistral-7b', precision='fp4', double_quant={double_quant})" in text


@pytest.mark.parametrize(
    ("settings", "merged", "says"),
    [
        ({}, False, "on a base in nf4"),
        ({"merge": "quantized-base"}, True, "into the quantized-base: the dequantized weights"),
        ({"merge": "full-base"}, True, "into the full-base: the original weights"),
        ({"merge": "full-base", "precision": "bf16"}, True, "into the weights that it was trained on"),
        ({"full": True, "precision": "bf16"}, False, "All weights were trained"),
    ],
)
def test_the_card_says_what_the_model_is(tmp_path: Path, settings: dict[str, Any], merged: bool, says: str) -> None:
    text = card(tmp_path, merged=merged, **settings)
    assert says in text
    whole = merged or settings.get("full", False)
    assert f"library_name: {'transformers' if whole else 'peft'}" in text
    assert ("load_adapter" in text) != whole
