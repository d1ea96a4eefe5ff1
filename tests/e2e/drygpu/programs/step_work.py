"""What a training step of finetune asks of a card: kernels, copies and waits, by setting."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
from typing import Any

import torch
from transformers import LlamaConfig

from finetune.config.settings import AdapterConfig, ModelConfig, TrainConfig
from finetune.data.batches import Batch
from finetune.model.host_inputs import release
from finetune.model.load import attach_adapter, load_base
from finetune.training.optim import make_optimizer
from finetune.training.step import train_step
from pytest_vram.drygpu import driver, empty_checkpoint

LAYERS = 4
SHAPE = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}


def counted(model: Any, micro_batches: int, kernels: str, on_host: bool = True) -> list[dict[str, int]]:
    config = TrainConfig(kernels=kernels, offload_activations=on_host)  # type: ignore[arg-type]  # a Literal from the command line
    optimizer = make_optimizer(model.parameters(), config)
    ids = torch.arange(2 * 256).view(2, 256) % 1024
    window = [Batch(input_ids=ids, labels=ids.clone()) for _ in range(micro_batches)]
    found = []
    for step in range(3):
        before = driver.work()
        train_step(model, window, optimizer, config, step=step, total_steps=3)
        found.append(dataclasses.asdict(driver.work() - before))
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    made = driver.work()
    optimizer.step()
    found.append(dataclasses.asdict(driver.work() - made))
    return found


results = {}
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
    shape = LlamaConfig(num_hidden_layers=LAYERS, num_key_value_heads=8, dtype="bfloat16", **SHAPE)
    path = str(empty_checkpoint(shape, folder, dtype="bfloat16"))
    for name, micro_batches, kernels in (("one", 1, "auto"), ("four", 4, "auto"), ("torch", 1, "torch")):
        model = attach_adapter(load_base(ModelConfig(model=path)), AdapterConfig(), seed=0)
        results[name] = counted(model, micro_batches, kernels)
        if name == "four":
            pinned = driver.stats(0).host_bytes
            release()
            results["pinned"] = pinned - driver.stats(0).host_bytes
            results["on card"] = counted(model, micro_batches, kernels, on_host=False)
print(json.dumps(results))
