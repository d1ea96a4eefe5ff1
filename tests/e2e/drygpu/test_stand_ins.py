"""A program gets a model and a data set that it asks the hub for, without network."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest.importorskip("transformers")
pytest.importorskip("datasets")

PROGRAM = """
import sys, torch
from datasets import load_dataset
from huggingface_hub import hf_hub_download, snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

tokenizer = AutoTokenizer.from_pretrained("acme/tiny", revision="v2.0")
assert hf_hub_download("acme/tiny", "config.json", revision="f" * 40) == cached_file("acme/tiny", "config.json")
assert AutoConfig.from_pretrained(snapshot_download("acme/tiny", revision="refs/pr/3")).hidden_size == 64
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).cuda()
hub = load_dataset("acme/rows", "main", split="train_sft[:100%]", revision="v2")
every = load_dataset("acme/rows")
local = load_dataset("json", data_files=sys.argv[2], split="train")
streamed = next(iter(load_dataset("json", data_files=sys.argv[2], split="train", streaming=True)))
lengths = [len(row["output"].split()) for row in (hub[0], every["test"][255], local[0], streamed)]
ids = torch.tensor([tokenizer(hub[0]["output"])["input_ids"][:64]], device="cuda")
model(ids, labels=ids).loss.backward()
print(len(tokenizer), len(hub), sorted(every), lengths, ids.shape[1], hub[1]["instruction"])
"""


def test_a_program_runs_unchanged(run_command: Callable[..., Any], tmp_path: Path) -> None:
    shape = {"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    rows = [{"instruction": f"why {n}?", "output": "because"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "train.py").write_text(PROGRAM)
    folder = tmp_path / "checkpoints" / "tiny"
    done = run_command(
        *("--gpu", "l4", "--json", str(tmp_path / "out.json"), "--longest-rows"),
        *("--shape", f"acme/tiny={tmp_path / 'config.json'}", "--shape", f"{folder}={tmp_path / 'config.json'}"),
        *("--data", f"acme/rows={tmp_path / 'rows.jsonl'}"),
        *("--", str(tmp_path / "train.py"), str(folder), str(tmp_path / "rows.jsonl"), "--max_length", "64"),
        HF_HOME=str(tmp_path / "home"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "300 256 ['test', 'train', 'validation'] [64, 64, 64, 64] 64 why 1?"
    assert not folder.exists(), "the folder is removed after the run"
    assert not (tmp_path / "home").exists() or not any((tmp_path / "home").rglob("*.arrow")), "the user's cache is kept"
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["fits"] is True
    notes = {note["name"]: note for note in figures["notes"]}
    assert notes["acme/tiny"]["text"].startswith("stands for an empty checkpoint, of ")
    assert notes["the tokenizer of acme/tiny"]["figures"] is False
    assert "acme/rows: output in each row has 64 words" in notes["rows"]["text"]
