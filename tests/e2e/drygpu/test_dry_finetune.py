"""The fine-tuner itself on a dry GPU: it trains, saves and resumes there, and says what to do where it does not fit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from finetune.errors import ExitCode

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import DryPython


def test_a_run_and_its_resumption_on_a_dry_card(
    dry_python: DryPython, tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    base = ["-m", "finetune.qlora", "--model", str(tiny_llama), "--data", str(rows), "--schedule", "constant"]
    base += ["--output", str(tmp_path / "run"), "--seq", "64", "--answer-tokens", "2", "--tensorboard"]
    for flags in (["--max-steps", "1"], ["--max-steps", "2", "--resume"]):
        done = dry_python(*base, *flags)
        assert done.returncode == ExitCode.OK, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["device"] == "cuda"
    assert summary["steps"] == 2
    assert summary["peak_allocated_bytes"] > 2**20


def test_out_of_device_memory_is_explained(dry_python: DryPython, tmp_path: Path) -> None:
    flags = ["--micro-batch", "64", "--seq", "512", "--no-checkpointing", "--answer-tokens", "0", "--eval-every", "0"]
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
