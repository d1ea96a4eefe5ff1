"""Which micro-batches and recomputed layers a run chooses: on an empty card, on a full one, and without a choice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig

from finetune.config.settings import AdapterConfig, ModelConfig, RunConfig, TrainConfig
from finetune.dryrun.full_rows import FullRows
from finetune.model.load import attach_adapter, load_base
from finetune.training import split
from finetune.training.accumulate import window_gradients
from finetune.training.split import MARGIN, Split, chosen_split, keep_gradients
from pytest_vram.drygpu import driver, empty_checkpoint

ROWS, MANY, TOKENS = 12, 60, 1024
SHAPE = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
tidy = split._tidy
DATA = FullRows(count=64, tokens=TOKENS, vocabulary=1024)


def fits(model: Any, size: int, **train: Any) -> bool:
    try:
        window_gradients(
            model, [DATA.batch([0] * size)], TrainConfig(**{"checkpointing": "all", "loss_chunk": 16384} | train)
        )
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
    return True


def chosen(model: Any, **train: Any) -> list[Any]:
    config = RunConfig(train=TrainConfig(**{"accumulation": ROWS, "loss_chunk": 16384} | train))
    found = chosen_split(model, DATA, config)
    train = found.config.train
    return [train.micro_batch, train.accumulation, train.checkpointing, found.note]


@contextlib.contextmanager
def room_for(model: Any, size: int, **train: Any) -> Any:
    """Fill the card so far that a micro-batch of this size fits beside the margin."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    fits(model, size, **train)
    need = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    room = need - torch.cuda.memory_reserved() + int(MARGIN * total)
    ballast = torch.empty(free - room, dtype=torch.uint8, device="cuda")
    yield
    del ballast


def gradients(model: Any, **train: Any) -> list[Any]:
    """What is said of earlier gradients, and the bytes that three micro-batches then copy to the host."""
    window = {"accumulation": 3, "split": "given", "checkpointing": "all", "offload_activations": False} | train
    config = RunConfig(train=TrainConfig(**{"loss_chunk": 16384} | window))
    note = keep_gradients(model, DATA, Split(config=config))
    before = driver.work()
    window_gradients(model, [DATA.batch([0])] * 3, config.train)
    model.zero_grad(set_to_none=True)
    return [note, (driver.work() - before).copied_to_host_bytes]


def half_of_the_card_is_there() -> bool:
    half = torch.cuda.get_device_properties(0).total_memory // 2
    try:
        torch.empty(half, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


results: dict[str, Any] = {}
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
    shape = LlamaConfig(num_hidden_layers=2, num_key_value_heads=8, dtype="bfloat16", **SHAPE)
    path = str(empty_checkpoint(shape, folder, dtype="bfloat16"))
    model: Any = attach_adapter(load_base(ModelConfig(model=path)), AdapterConfig(), seed=0)
    fits(model, 1)  # the workspace of cuBLAS stays
    held = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(0.9)  # as a user may do
    peaks: list[int] = []
    peak = torch.cuda.max_memory_allocated
    with mock.patch.object(split, "_tidy", lambda model: (peaks.append(peak()), tidy(model))):
        results["empty"] = chosen(model)
    torch.cuda.reset_peak_memory_stats()
    fits(model, ROWS, checkpointing="none")
    results["beside the step"] = max(peaks) - peak()
    results["margin"] = int(MARGIN * torch.cuda.mem_get_info()[1])
    told = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # torch 2.6 does not tell
    results["fraction"] = told() if told is not None else 0.9
    torch.cuda.set_per_process_memory_fraction(1.0)
    with split._at_most(0.25, torch.device("cuda", 0)):
        results["capped"] = [half_of_the_card_is_there()]
    results["capped"].append(half_of_the_card_is_there())
    results["given"] = chosen(model, split="given")
    config = RunConfig(train=TrainConfig(accumulation=ROWS, loss_chunk=16384, split="given"))
    known = chosen_split(model, DATA, config)
    torch.cuda.empty_cache()
    torch.empty(6 * 2**30, dtype=torch.uint8, device="cuda")  # as loading may have held
    again = chosen_split(model, DATA, config)
    with mock.patch.object(split._Trials, "_run", side_effect=AssertionError("it was tried already")):
        results["gradients, tried"] = keep_gradients(model, DATA, known)
        results["gradients, tried and full"] = keep_gradients(model, DATA, dataclasses.replace(known, spare=0))
    results["spare"] = [known.spare, again.spare]
    results["gradients, untried"] = keep_gradients(model, DATA, Split(config=known.config))
    model.get_base_model().config.model_type = "unheard-of"
    results["unknown"] = chosen(model)
    model.get_base_model().config.model_type = "llama"
    results["all given"] = chosen(model, split="given", checkpointing=1)
    results["left"] = torch.cuda.memory_allocated() - held
    results["gradients"] = any(p.grad is not None for p in model.parameters())
    results["gradients, empty"] = gradients(model)
    results["gradients, ordinary optimizer"] = gradients(model, optimizer="adamw-8bit")
    with room_for(model, 1, offload_activations=False):
        results["gradients, full"] = gradients(model)
    with room_for(model, 5):
        results["full"] = chosen(model, checkpointing="all")
        results["fits"] = {size: fits(model, size) for size in (results["full"][0], MANY)}
        results["prime"] = chosen(model, accumulation=7, checkpointing="all")
    with room_for(model, 10, checkpointing=1):
        results["given and full"] = chosen(model, micro_batch=8, split="given")
    rooms = {"tight": lambda _, config: config.train.offload_activations is True, "none": lambda *_: False}
    for name, room in rooms.items():
        with mock.patch.object(split._Trials, "_run", room):
            found = chosen_split(model, DATA, RunConfig())
        train = found.config.train
        results[name] = [train.micro_batch, train.checkpointing, train.offload_activations, found.note]
    other: Any = attach_adapter(load_base(ModelConfig(model=path)), AdapterConfig(dropout=0.1), seed=0)
    results["dropout"] = chosen(other)
print(json.dumps(results))
