"""Out of memory is recognised in every wording, and the remedies are those that save most."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune import configfile
from finetune.config import RunConfig
from finetune.errors import ExitCode, ModelError, OutOfMemoryError
from finetune.oom import Holdings, explained, largest_savings


def wrapped(cause: Exception) -> ModelError:
    error = ModelError("model = 'x': cannot be loaded")
    error.__cause__ = cause
    return error


CPU_WORDS = "[enforce fail at alloc_cpu.cpp:126] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (MemoryError(), "MemoryError"),
        (RuntimeError(CPU_WORDS + "allocate 4503 bytes. Error code 12"), "4503 bytes more"),
        (RuntimeError("std::bad_alloc"), "bad_alloc"),
        (OSError("Cannot allocate memory (os error 12)"), "os error 12"),
        (wrapped(MemoryError()), "MemoryError"),
    ],
    ids=["python", "torch", "c++", "safetensors", "wrapped"],
)
def test_every_wording_is_recognised(error: Exception, asked: str) -> None:
    holdings = Holdings()
    holdings.model = torch.nn.Linear(1024, 1024)
    holdings.model.weight.requires_grad_(False)
    with pytest.raises(OutOfMemoryError) as caught, explained(RunConfig(), holdings):
        raise error
    text = str(caught.value)
    assert asked in text
    assert "base weights 4.0 MiB" in text
    assert caught.value.exit_code == ExitCode.OUT_OF_MEMORY
    assert caught.value.budget_bytes is not None
    assert caught.value.held_bytes > 2**20


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), OSError("no such file"), ModelError("no")])
def test_other_errors_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explained(RunConfig(), Holdings()):
        raise error
    assert caught.value is error


def config(**settings: Any) -> RunConfig:
    return configfile.replace(RunConfig(), {"model": "mistral-7b", "data": "rows.jsonl", **settings})


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"precision": "bf16"}, "--precision nf4"),
        ({"micro_batch": 16, "seq": 2048}, "--micro-batch 1 --accumulation 256"),
        ({"checkpointing": False, "seq": 4096}, "--checkpointing"),
        ({"full": True, "precision": "fp32"}, "--no-full --precision nf4"),
    ],
)
def test_the_remedy_that_saves_most_comes_first(settings: dict[str, Any], first: str) -> None:
    savings = largest_savings(config(**settings), on_device=True)
    assert savings[0].flags == first
    assert len(savings) <= 3
    sizes = [s.saved_bytes for s in savings]
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) > 0


def test_a_remedy_says_whether_the_run_can_go_on_with_it() -> None:
    savings = {s.flags: s.resumes for s in largest_savings(config(micro_batch=16, seq=2048), on_device=True, count=9)}
    assert savings["--micro-batch 1 --accumulation 256"]
    assert savings["--offload-activations"]
    assert not savings["--seq 1024"]


def test_a_model_of_unknown_shape_has_no_remedies(tmp_path: Any) -> None:
    assert largest_savings(config(model=str(tmp_path / "nothing")), on_device=True) == []
