"""Out of memory is recognised in every wording, and the remedies are the settings that save the most."""

from __future__ import annotations

import re
import weakref
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from finetune.config import yaml_file
from finetune.config.settings import RunConfig
from finetune.errors import ExitCode, ModelError, OutOfMemoryError
from finetune.training.oom import Holdings, explained, largest_savings


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


def test_what_is_held_is_told_by_its_holder() -> None:
    holdings = Holdings()
    assert holdings.bytes_by_holder() == {}
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 2, bias=False))
    model[0].weight.requires_grad_(False)
    holdings.model = model
    assert holdings.bytes_by_holder() == {"base weights": 256, "trained weights": 64}
    holdings.optimizer = torch.optim.AdamW(model[1].parameters())
    model(torch.ones(1, 8)).sum().backward()
    holdings.optimizer.step()
    held = holdings.bytes_by_holder()
    assert held.pop("optimizer states") == 2 * 64 + 4  # two moments and the step's number
    assert held == {"base weights": 256, "trained weights": 64, "gradients": 64}


def test_parts_that_wait_on_the_host_are_told_apart() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        holdings = Holdings()
        holdings.model = torch.nn.Linear(8, 4)
        part = DTensor.from_local(torch.zeros(4, 8), mesh, [Shard(0)])
        holdings.model.weight = torch.nn.Parameter(part, requires_grad=False)
        holdings.model.bias.requires_grad_(False)
        for offload, held in (
            (False, {"base weights": 144}),
            (True, {"base weights": 16, "parts of the base on the host": 128}),
        ):
            holdings.config = config(shard=True, offload_base=offload)
            assert holdings.bytes_by_holder() == held
    finally:
        torch.distributed.destroy_process_group()


def test_weights_in_4_bits_are_counted_with_their_scales() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    holdings = Holdings()
    holdings.model = bitsandbytes.nn.Linear4bit(256, 256, bias=False, quant_type="nf4", compress_statistics=True).to(
        "cpu"
    )
    packed, scales = 256 * 256 // 2, 256 * 256 // 64
    code_books = 4 * 16 + 4 * 256  # of NF4 and of the 8-bit scales
    held = holdings.bytes_by_holder()["base weights"]
    assert held == packed + scales + 4 * scales // 256 + 4 + code_books  # the 4 bytes are the scales' offset


def test_what_filled_the_memory_is_let_go_before_it_is_told() -> None:
    class Large:
        pass

    large: list[weakref.ref[Large]] = []
    alive: list[bool] = []

    class Watching(Holdings):
        def bytes_by_holder(self) -> dict[str, int]:
            alive.append(large[0]() is not None)
            return super().bytes_by_holder()

    def fill() -> None:
        held = Large()
        large.append(weakref.ref(held))
        raise MemoryError

    with pytest.raises(OutOfMemoryError), explained(RunConfig(), Watching()):
        fill()
    assert alive == [False]


def test_the_settings_that_the_run_uses_are_explained() -> None:
    holdings = Holdings()
    holdings.config = config(micro_batch=16, accumulation=1, seq=2048)
    with pytest.raises(OutOfMemoryError, match="--micro-batch 1 --accumulation 16 "), explained(config(), holdings):
        raise MemoryError


def test_the_parts_come_to_what_is_held() -> None:
    holdings = Holdings()
    holdings.model = torch.nn.Linear(4096, 8192, bias=False)
    with pytest.raises(OutOfMemoryError) as caught, explained(RunConfig(), holdings):
        raise MemoryError
    (line,) = (line for line in str(caught.value).splitlines() if line.startswith("  held "))
    units = {"GiB": 2**30, "MiB": 2**20}
    whole, *parts = (float(size) * units[unit] for size, unit in re.findall(r"([\d.]+) ([GM]iB)", line))
    assert len(parts) == 2
    assert parts[0] == pytest.approx(2**27, abs=2**23)
    assert sum(parts) == pytest.approx(whole, abs=2**24)


def test_on_the_host_there_is_nothing_to_page_to() -> None:
    settings = config(rank=256, optimizer="paged-adamw", checkpointing=False)
    host, device = (
        {s.flags: s.saved_bytes for s in largest_savings(settings, on_device=on_device, count=9)}
        for on_device in (False, True)
    )
    trained = 256 * 2 * 41_943_040 // 32  # rank 16 trains 41,943,040 numbers
    assert host["--optimizer paged-adamw-8bit"] == pytest.approx(6 * trained, rel=0.05)
    assert device.get("--optimizer paged-adamw-8bit", 0) < trained
    assert min(*host.values(), *device.values()) > 0


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), OSError("no such file"), ModelError("no")])
def test_other_errors_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explained(RunConfig(), Holdings()):
        raise error
    assert caught.value is error


def config(**settings: Any) -> RunConfig:
    return yaml_file.replace(RunConfig(), {"model": "mistral-7b", "data": "rows.jsonl", **settings})


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"precision": "bf16"}, "--precision nf4"),
        ({"micro_batch": 16, "seq": 2048}, "--micro-batch 1 --accumulation 256"),
        ({"checkpointing": False, "seq": 4096}, "--checkpointing all"),
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
    run = config(micro_batch=16, seq=2048, offload_activations=False)
    savings = {s.flags: s.resumes for s in largest_savings(run, on_device=True, count=9)}
    assert savings["--micro-batch 1 --accumulation 256"]
    assert savings["--checkpointing all --offload-activations"]
    assert not savings["--seq 1024"]


def test_a_model_of_unknown_shape_has_no_remedies(tmp_path: Any) -> None:
    assert largest_savings(config(model=str(tmp_path / "nothing")), on_device=True) == []
