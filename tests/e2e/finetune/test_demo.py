"""The demo, shortened: the real model from its wheel, on real text, offline."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from finetune.config.settings import DEMO_QUESTION

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Forked

SHORT = (
    "--max-steps",
    "3",
    "--micro-batch",
    "2",
    "--accumulation",
    "2",
    "--eval-fraction",
    "0.004",
    "--answer-tokens",
    "3",
    "--seq",
    "96",
    "--eval-every",
    "0",
)


def test_the_demo_learns_from_three_steps(qlora: Forked, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    outcome = qlora.raw([*SHORT, "--output", str(output)], output=output)
    assert outcome.code == 0, outcome.err
    summary = json.loads((output / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"] - 0.02
    assert summary["peak_rss_bytes"] < 4 * 2**30
    assert summary["settings"]["precision"] == "nf4"
    assert summary["trained_parameters"] == 2_442_240
    assert summary["question"] == DEMO_QUESTION
