"""The default of every setting. Recorded configs, README and examples of earlier runs depend on them."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.config import yaml_file
from finetune.config.settings import DEMO, EMBEDDED_DATA, EMBEDDED_MODEL, RunConfig

# QLoRA as its paper has it (https://arxiv.org/abs/2305.14314): NF4, scales quantized too, adapters on every linear
# layer, paged AdamW; the loss on answers alone, gradients of norm 1 at most, activations computed anew.
DEFAULTS: dict[str, Any] = {
    "precision": "nf4",
    "double_quant": True,
    "compute_dtype": "auto",
    "full": False,
    "rank": 16,
    "alpha": 32.0,
    "targets": ("all-linear",),
    "dropout": 0.0,
    "train_on_prompt": False,
    "packing": False,
    "skip_bad_rows": False,
    "clip": 1.0,
    "weight_decay": 0.0,
    "optimizer": "paged-adamw",
    "schedule": "cosine",
    "checkpointing": "auto",
    "resume": False,
    "overwrite": False,
    "merge": "none",
    "dry_run": False,
    "fit": False,
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_default_is_what_it_was(name: str) -> None:
    assert yaml_file.flatten(RunConfig())[name] == DEFAULTS[name]


@pytest.mark.parametrize(
    ("model", "data", "embedded"),
    [
        (EMBEDDED_MODEL, EMBEDDED_DATA, True),
        ("mistral-7b", EMBEDDED_DATA, False),
        (EMBEDDED_MODEL, "rows.jsonl", False),
        ("mistral-7b", "rows.jsonl", False),
    ],
)
def test_the_demo_is_the_embedded_model_on_the_embedded_data(model: str, data: str, embedded: bool) -> None:
    assert yaml_file.replace(RunConfig(), {"model": model, "data": data}).embedded == embedded


def test_the_demo_can_be_run_again() -> None:
    assert DEMO.embedded
    assert DEMO.output.overwrite
    assert DEMO.output.output != RunConfig().output.output
