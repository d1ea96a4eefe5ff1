"""What makes the step lean costs no digits: in bf16 it loses what the recipe of transformers' Trainer loses.

The peer keeps adapters, embeddings, head and norms in fp32, and the logits of the whole micro-batch; here all of them
are in bf16, and the logits are there a few tokens at a time. ``benchmarks/peak_memory.py`` says what that saves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tiny_models import make_rows, padded, save_tiny

from finetune.config.settings import AdapterConfig, ModelConfig, TrainConfig
from finetune.kernels.fused_adapter import fuse
from finetune.model.load import attach_adapter, load_base
from finetune.training.optim import BETAS, EPS, make_optimizer
from finetune.training.step import train_step

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from finetune.data.batches import Batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"),
]
STEPS, RATE, RANK = 12, 2e-3, 8
WINDOWS = [[padded(make_rows([33, 21], seed=s)), padded(make_rows([40, 9, 27], seed=s + 50))] for s in range(3)] * 4


def base_of(folder: Path) -> Any:
    return load_base(ModelConfig(model=str(folder), precision="nf4", compute_dtype="bf16", device="cpu"))


def ours(folder: Path, *, fused: bool) -> list[float]:
    model = attach_adapter(base_of(folder), AdapterConfig(rank=RANK, alpha=2.0 * RANK), seed=0)
    if fused:  # as on a card
        assert not fuse(model).left
    config = TrainConfig(
        optimizer="paged-adamw", learning_rate=RATE, schedule="constant", warmup_steps=0, loss_chunk=7, max_steps=STEPS
    )
    optimizer = make_optimizer(model.parameters(), config)
    return [
        train_step(model, window, optimizer, config, step=step, total_steps=STEPS).loss
        for step, window in enumerate(WINDOWS)
    ]


def theirs(folder: Path) -> list[float]:
    """fp32 adapters under autocast, whole logits upcast: what Trainer does with ``bf16=True``, its mean put right."""
    weights = attach_adapter(base_of(folder), AdapterConfig(rank=RANK, alpha=2.0 * RANK), seed=0).state_dict()
    base = prepare_model_for_kbit_training(base_of(folder), gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.dtype == torch.float32
                parameter.copy_(weights[name])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.0)
    losses = []
    for window in WINDOWS:
        model.train()
        losses.append(_window(model, window))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _window(model: Any, window: Sequence[Batch]) -> float:
    targets = sum(batch.targets for batch in window)
    total = 0.0
    for batch in window:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"
        )
        (loss / targets).backward()
        total += float(loss.detach()) / targets
    return total


def test_twelve_steps_in_bf16_lose_what_the_fp32_recipe_loses(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    fat = theirs(folder)
    assert fat[-1] < 0.97 * fat[2]  # the same window again: it learns, so that the losses after the first say something
    for fused in (False, True):
        assert ours(folder, fused=fused) == pytest.approx(fat, rel=1e-3)
