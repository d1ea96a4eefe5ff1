"""torch's own memory interface says on a dry GPU what its driver says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram.drygpu import find_card

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def memory(run_program: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_program("memory.py", str(tmp_path_factory.mktemp("memory") / "file"), count=2)


def value(results: dict[str, Any], name: str) -> Any:
    assert "error" not in results[name], results[name]["error"]
    return results[name]["value"]


def test_statistics_agree_with_the_driver(memory: dict[str, Any]) -> None:
    found = value(memory, "statistics")
    assert found.pop("allocated") == 0
    assert found.pop("after empty_cache") == 0
    assert all(found.values()), found


def test_history_has_sizes_and_lines(memory: dict[str, Any]) -> None:
    assert value(memory, "history") == {"sizes": True, "frames": True}


def test_memory_fraction_is_a_limit(memory: dict[str, Any]) -> None:
    assert "2.35 GiB allowed" in value(memory, "fraction")


def test_a_program_goes_on_after_out_of_memory(memory: dict[str, Any]) -> None:
    found = value(memory, "out_of_memory_and_on")
    assert found["again"] == 10
    assert f"total capacity of {find_card('rtx-4090').total_bytes / 2**30:.2f} GiB" in found["text"]


def test_streams_events_and_pinned_memory(memory: dict[str, Any]) -> None:
    assert value(memory, "streams_and_pinned") == {"pinned": True, "moved": [1000, 1000], "time": True}


def test_two_devices_are_two(memory: dict[str, Any]) -> None:
    found = value(memory, "devices")
    assert found == {
        "count": 2,
        "sums": [45, 45, 90],
        "apart": True,
        "uuids": 2,
        "name": "NVIDIA GeForce RTX 4090",
    }


def test_tensors_come_and_go_between_host_and_device(memory: dict[str, Any]) -> None:
    assert value(memory, "saved_on_the_host") == [64, 64]


def test_nvml_sees_the_same_card(memory: dict[str, Any]) -> None:
    assert value(memory, "nvml") == {"count": 2, "used": True, "total": True}


def test_convolutions_train(memory: dict[str, Any]) -> None:
    assert all(value(memory, "convolutions"))


def test_decompositions_and_transforms_train_and_say_what_is_not_counted(memory: dict[str, Any]) -> None:
    found = value(memory, "decompositions_and_transforms")
    assert found["gradient"] == [4, 16, 16]
    assert {name.split(" ")[0] for name in found["noted"]} >= {"cuSOLVER", "cuFFT"}


def test_the_profiler_sees_device_memory(memory: dict[str, Any]) -> None:
    assert value(memory, "profiler") == 4096


STEP = """
import torch
layers = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(4)]).cuda()
for rows in (64, 4096, 1000, 2500):
    layers(torch.randn(rows, 1024, device="cuda")).sum().backward()
    layers.zero_grad()
statistics = torch.cuda.memory_stats()
print(statistics["allocated_bytes.all.peak"], statistics["reserved_bytes.all.peak"], torch.cuda.get_allocator_backend())
"""

SETTINGS = (
    "expandable_segments:True",
    "max_split_size_mb:64",
    "roundup_power2_divisions:4",
    "garbage_collection_threshold:0.6",
    "large_segment_size_mb:64",
    "pinned_use_background_threads:True",
    "roundup_power2_divisions:[256:1,1024:4,>:8],throw_on_cudamalloc_oom:True,per_process_memory_fraction:0.9",
    "release_lock_on_cudamalloc:True,pinned_use_cuda_host_register:True,pinned_num_register_threads:2",
    "graph_capture_record_stream_reuse:True,pinned_reserve_segment_size_mb:64",
    "backend:cudaMallocAsync",
)


@pytest.mark.parametrize("setting", SETTINGS)
def test_allocator_settings(dry_python: Callable[..., Any], setting: str) -> None:
    done = dry_python("-c", STEP, PYTORCH_CUDA_ALLOC_CONF=setting)
    assert done.returncode == 0, done.stderr
    allocated, reserved, backend = done.stdout.split()
    assert 0 < int(allocated) <= int(reserved)
    assert backend == ("cudaMallocAsync" if "Async" in setting else "native")


POOL = """
import torch
MB = 1 << 20
reserved = lambda: torch.cuda.memory_reserved() // MB
take = lambda size: torch.empty(size * MB, dtype=torch.uint8, device="cuda")
first, middle, last = take(20), take(20), take(20)
found = [reserved()]
del middle
larger = take(24)
found.append(reserved())
back = take(20)
found.append(reserved())
byte = torch.empty(5, dtype=torch.uint8, device="cuda")
found.append(torch.cuda.memory_allocated() - 84 * MB)
used = torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]
del first, larger, last, byte
torch.cuda.empty_cache()
found += [reserved(), (used - torch.cuda.mem_get_info()[1] + torch.cuda.mem_get_info()[0]) // MB]
print(found)
"""


def test_the_pool_of_the_driver_can_be_fragmented(dry_python: Callable[..., Any]) -> None:
    """24 MB do not fit where 20 were freed, and 20 do. Pieces of 32 MiB that are free as a whole are given back."""
    done = dry_python("-c", POOL, PYTORCH_CUDA_ALLOC_CONF="backend:cudaMallocAsync")
    assert done.returncode == 0, done.stderr
    # 60 in use, then 24 above them, then the hole filled; of three pieces the one block lies in two.
    assert done.stdout.strip() == "[64, 96, 96, 5, 64, 32]"


REFUSED = """
import torch
from pytest_vram.drygpu import driver
GB = 1 << 30
take = lambda size: torch.empty(size * GB, dtype=torch.uint8, device="cuda")
first, middle, last = take(8), take(8), take(1)
found = [driver.stats(0).refusals]
del first
larger = take(9)  # 8 GB are free elsewhere in the pool, and given back for it
found.append(driver.stats(0).refusals)
for size in (9, 100):
    try:
        take(size)
    except torch.OutOfMemoryError:
        found.append(driver.stats(0).refusals)
print(found)
"""


def test_the_pool_of_the_driver_counts_each_refusal_once(dry_python: Callable[..., Any]) -> None:
    """PyTorch asks once more after a refusal, so that each tensor that does not fit is refused twice."""
    done = dry_python("-c", REFUSED, PYTORCH_CUDA_ALLOC_CONF="backend:cudaMallocAsync")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0, 0, 2, 4]"


NEUTRAL = """
import sys, torch
if sys.argv[1] == "carried":
    from pytest_vram.drygpu.values import carry
    carry.install()
torch.manual_seed(0)
table = torch.nn.Embedding(512, 64, device="cuda")
layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 512)).cuda()
optimizer = torch.optim.AdamW([*table.parameters(), *layers.parameters()], foreach=False)
torch.cuda.memory._record_memory_history(stacks="python")
for step in range(3):
    ids = torch.randint(0, 512, (4, 32)).cuda()
    mask = (ids > 5) & (ids != 7)
    logits = layers(table(ids) * mask[..., None] + 1)
    loss = torch.nn.functional.cross_entropy(logits.view(-1, 512), ids.view(-1).masked_fill(~mask.view(-1), -100))
    (loss / 3 + logits.float().pow(2).mean() - 2 * logits.abs().max()).backward()
    optimizer.step()
    optimizer.zero_grad()
trace = torch.cuda.memory._snapshot()["device_traces"][0]
print([(entry["action"], entry["size"]) for entry in trace])
"""


def test_carrying_values_changes_no_allocation(dry_python: Callable[..., Any], tmp_path: Path) -> None:
    """The same requests in the same order, autograd's in-place accumulation of gradients included."""
    script = tmp_path / "step.py"
    script.write_text(NEUTRAL)
    carried = dry_python(str(script), "carried")
    bare = dry_python(str(script), "bare", PYTHONPATH="")
    assert carried.returncode == bare.returncode == 0, carried.stderr + bare.stderr
    assert carried.stdout == bare.stdout
    assert carried.stdout.count("alloc") > 100
