"""The fine-tuner itself on a dry GPU: it trains, saves and resumes there, and says what to do where it does not fit."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from finetune.errors import ExitCode
from pytest_vram.drygpu import empty_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import DryPython


TOLD = """
import os, sys
from pathlib import Path
from finetune.qlora import main
from finetune.training import loop
own = loop.train_step
def told(*args, **kwargs):
    compiled = Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")
    print("compiled before a step:", *sorted({path.stem for path in compiled}))
    return own(*args, **kwargs)
loop.train_step = told
sys.exit(main())
"""


def test_a_run_and_its_resumption_on_a_dry_card(
    dry_python: DryPython, tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    """Its own kernels are compiled for that card before the first step, by the windows that run beforehand."""
    kernels = ["_cross_entropy", "_adamw"]
    if hasattr(pytest.importorskip("triton.language"), "gather"):  # Triton 3.3, of torch 2.7
        kernels.append("_decode")
    base = ["--model", str(tiny_llama), "--data", str(rows), "--schedule", "constant"]
    base += ["--output", str(tmp_path / "run"), "--seq", "64", "--answer-tokens", "2", "--tensorboard"]
    for program, flags in ((["-c", TOLD], ["1"]), (["-m", "finetune.qlora"], ["2", "--resume"])):
        done = dry_python(*program, *base, "--max-steps", *flags, TRITON_CACHE_DIR=str(tmp_path / "kernels"))
        assert done.returncode == ExitCode.OK, done.stderr
        if "-c" in program:
            (line,) = (line for line in done.stdout.splitlines() if line.startswith("compiled"))
            assert set(kernels) <= set(line.split())
    for name in kernels:
        (found,) = {json.loads(file.read_text())["target"]["arch"] for file in tmp_path.rglob(f"{name}.json")}
        assert found == 89  # an RTX 4090
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["device"] == "cuda"
    assert summary["steps"] == 2
    assert summary["peak_allocated_bytes"] > 2**20


def wide_llama(folder: Path, tokenizer: Path) -> Path:
    """Write a Llama whose activations are large, without weights, and give it the tokenizer of another model."""
    shape = json.loads((tokenizer / "config.json").read_text())
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16}
    empty_checkpoint(shape | wide | {"head_dim": 64, "max_position_embeddings": 1024}, folder, dtype="bfloat16")
    for path in [*tokenizer.glob("token*"), *tokenizer.glob("special*"), *tokenizer.glob("*.jinja")]:
        shutil.copy(path, folder)
    return folder


def test_out_of_device_memory_is_explained(dry_python: DryPython, tiny_llama: Path, tmp_path: Path) -> None:
    model, data = wide_llama(tmp_path / "model", tiny_llama), tmp_path / "rows.jsonl"
    row = json.dumps({"prompt": "count", "completion": "one " * 200})
    data.write_text(f"{row}\n" * 300)
    flags = ["--model", str(model), "--data", str(data)]
    flags += [
        "--micro-batch",
        "64",
        "--accumulation",
        "4",
        "--seq",
        "512",
        "--no-checkpointing",
        "--answer-tokens",
        "0",
        "--eval-every",
        "0",
    ]
    done = dry_python("-m", "finetune.qlora", *flags, "--output", str(tmp_path / "run"), gpu="rtx-4060")
    assert done.returncode == ExitCode.OUT_OF_MEMORY, done.stderr
    for words in (
        "out of memory on the GPU",
        "budget",
        "held",
        "--micro-batch 1 --accumulation 256",
        "--checkpointing",
    ):
        assert words in done.stderr
