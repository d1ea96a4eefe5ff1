"""Which micro-batches a run chooses on an empty card, on one that is almost full, and where it has no choice."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from finetune.config.settings import AdapterConfig, ModelConfig, RunConfig, TrainConfig
from finetune.data.batches import Batch
from finetune.model.load import attach_adapter, load_base
from finetune.training.accumulate import window_gradients
from finetune.training.split import MARGIN, largest_split
from pytest_vram.drygpu import empty_checkpoint

ROWS, MANY, TOKENS = 12, 60, 1024
SHAPE = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}


class Rows:
    """As many rows of one length as anybody asks for."""

    def sequence_lengths(self) -> Any:
        return np.full(64, TOKENS)

    def batch(self, sequences: list[int]) -> Batch:
        ids = (torch.arange(len(sequences) * TOKENS) % 1024).view(len(sequences), TOKENS)
        return Batch(input_ids=ids, labels=ids.clone())


def fits(model: Any, size: int) -> bool:
    try:
        window_gradients(model, [Rows().batch([0] * size)], TrainConfig())
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
    return True


def chosen(model: Any, **train: Any) -> list[Any]:
    config = RunConfig(train=TrainConfig(**train))
    found, note = largest_split(model, Rows(), config)  # type: ignore[arg-type]  # a stand-in
    return [found.train.micro_batch, found.train.accumulation, note]


results: dict[str, Any] = {}
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
    shape = LlamaConfig(num_hidden_layers=2, num_key_value_heads=8, dtype="bfloat16", **SHAPE)
    path = str(empty_checkpoint(shape, folder, dtype="bfloat16"))
    model: Any = attach_adapter(load_base(ModelConfig(model=path)), AdapterConfig(), seed=0)
    fits(model, 1)  # the workspace of cuBLAS stays
    held = torch.cuda.memory_allocated()
    results["empty"] = chosen(model, accumulation=ROWS)
    results["given"] = chosen(model, accumulation=ROWS, split="given")
    results["left"] = torch.cuda.memory_allocated() - held
    results["gradients"] = any(p.grad is not None for p in model.parameters())
    total = torch.cuda.get_device_properties(0).total_memory
    fits(model, 5)
    need = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    room = need - torch.cuda.memory_reserved() + int(MARGIN * total)
    ballast = torch.empty(free - room, dtype=torch.uint8, device="cuda")
    results["full"] = chosen(model, accumulation=ROWS)
    results["fits"] = {size: fits(model, size) for size in (results["full"][0], MANY)}
    results["prime"] = chosen(model, accumulation=7)
    del ballast
    other: Any = attach_adapter(load_base(ModelConfig(model=path)), AdapterConfig(dropout=0.1), seed=0)
    results["dropout"] = chosen(other, accumulation=ROWS)
print(json.dumps(results))
