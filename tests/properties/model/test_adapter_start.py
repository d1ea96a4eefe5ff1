"""Every start of an adapter leaves the first output the base's, on every kind of base."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import pytest
import torch
from tiny_models import make_rows, padded, relative_l2, save_tiny

from finetune.config.settings import AdapterConfig, ModelConfig, Precision, TrainConfig
from finetune.model.load import attach_adapter, load_base
from finetune.training.accumulate import window_gradients

if TYPE_CHECKING:
    from pathlib import Path

BATCH = padded(make_rows([12, 7], seed=1))
INITS = ("default", "gaussian", "orthogonal")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # asked by peft 0.21
def test_the_first_output_is_the_bases_and_the_first_gradient_is_not_zero(
    folder: Path, precision: str, dora: bool, init: str
) -> None:
    half = precision in ("fp16", "bf16")
    compute = precision if half else "fp32"
    base = load_base(ModelConfig(model=str(folder), precision=precision, compute_dtype=compute, device="cpu"))  # type: ignore[arg-type]  # one of the Literal's values
    model, alone = base, None
    for _ in range(2):
        with torch.no_grad():
            logits = model(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask).logits.float()
        if alone is not None:
            break
        alone = logits
        model = attach_adapter(base, AdapterConfig(rank=4, dora=dora, init=init), seed=0).eval()  # type: ignore[arg-type]  # one of the Literal's values
    starts = {part: [p for n, p in model.named_parameters() if part in n] for part in ("lora_A", "lora_B")}
    assert all(p.any() for p in starts["lora_A"])
    assert all(bool(p.any()) == (init == "orthogonal") for p in starts["lora_B"])
    # B A of a rounded orthogonal pair is its rounding; with B = 0 the output is the base's but for DoRA's quotient.
    bound = {"fp16": 1e-2, "bf16": 3e-2}.get(precision, 1e-5) if init == "orthogonal" else 1e-6
    assert relative_l2([logits], [alone]) <= bound
    assert torch.equal(logits, alone) or dora or init == "orthogonal"
    window_gradients(model, [BATCH], TrainConfig())
    assert all(p.grad is not None and p.grad.any() for p in starts["lora_B"])
