"""torch's memory interface on two dry GPUs."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import torch
from checks import Checks

from pytest_vram.drygpu import driver

check = Checks()
FILE = sys.argv[1]
GIB = 1 << 30


@check
def statistics() -> Any:
    kept = torch.empty(3 * GIB, dtype=torch.uint8, device="cuda")
    found = torch.cuda.memory_stats()
    driver_says = driver.stats(0)
    answer = {
        "allocated": found["allocated_bytes.all.current"] - kept.numel(),
        "reserved is the driver's": found["reserved_bytes.all.current"]
        == driver_says.used_bytes - driver_says.context_bytes,
        "free": torch.cuda.mem_get_info()[0] == driver_says.total_bytes - driver_says.used_bytes,
        "summary": "allocated memory" in torch.cuda.memory_summary().lower(),
        "snapshot": sum(segment["total_size"] for segment in torch.cuda.memory_snapshot())
        == found["reserved_bytes.all.current"],
    }
    del kept
    torch.cuda.empty_cache()
    answer["after empty_cache"] = torch.cuda.memory_reserved()
    return answer


@check
def history() -> Any:
    torch.cuda.memory._record_memory_history(stacks="python")
    kept = torch.empty(5000, device="cuda")
    torch.cuda.memory._dump_snapshot(FILE)
    torch.cuda.memory._record_memory_history(enabled=None)
    with open(FILE, "rb") as file:
        snapshot = pickle.load(file)
    traced = [entry for trace in snapshot["device_traces"] for entry in trace]
    return {
        "sizes": kept.nbytes in [entry["size"] for entry in traced] or [entry["size"] for entry in traced],
        "frames": any("history" in frame["name"] for entry in traced for frame in entry["frames"]),
    }


@check
def fraction() -> Any:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.1)
    try:
        torch.empty(4 * GIB, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError as error:
        return str(error)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@check
def out_of_memory_and_on() -> Any:
    try:
        torch.empty(100 * GIB, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError as error:
        again = torch.ones(10, device="cuda")
        return {"text": str(error), "again": again.numel(), "ooms": torch.cuda.memory_stats()["num_ooms"]}


@check
def streams_and_pinned() -> Any:
    side, started, ended = (
        torch.cuda.Stream(),
        torch.cuda.Event(enable_timing=True),
        torch.cuda.Event(enable_timing=True),
    )
    started.record()
    with torch.cuda.stream(side):
        kept = torch.randn(1000, device="cuda") * 2
    kept.record_stream(torch.cuda.current_stream())
    torch.cuda.current_stream().wait_stream(side)
    ended.record()
    torch.cuda.synchronize()
    pinned = torch.randn(1000, 1000).pin_memory()
    moved = pinned.to("cuda", non_blocking=True)
    return {"pinned": pinned.is_pinned(), "moved": list(moved.shape), "time": started.elapsed_time(ended) >= 0}


@check
def devices() -> Any:
    here, there = torch.arange(10, device="cuda:0"), torch.arange(10, device="cuda:1")
    kept = torch.empty(GIB, dtype=torch.uint8, device="cuda:1")
    return {
        "count": torch.cuda.device_count(),
        "sums": [here.sum().item(), there.sum().item(), there.to("cuda:0").add_(here).sum().item()],
        "apart": torch.cuda.memory_allocated(1) - torch.cuda.memory_allocated(0) >= kept.numel() - 4096,
        "uuids": len({str(torch.cuda.get_device_properties(index).uuid) for index in range(2)}),
        "name": torch.cuda.get_device_name(1),
    }


@check
def saved_on_the_host() -> Any:
    layer = torch.nn.Linear(64, 64, device="cuda")
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        layer(torch.randn(4, 64, device="cuda")).relu().sum().backward()
    torch.save(layer.state_dict(), FILE)
    layer.load_state_dict(torch.load(FILE, map_location="cuda"))
    return list(layer.weight.grad.shape)  # type: ignore[union-attr]  # a gradient is there after backward


@check
def nvml() -> Any:
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "count": pynvml.nvmlDeviceGetCount(),
        "used": memory.used == driver.stats(0).used_bytes,
        "total": memory.total == torch.cuda.get_device_properties(0).total_memory,
    }


@check
def convolutions() -> Any:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.MaxPool2d(2)
    ).cuda()
    net(torch.randn(2, 3, 32, 32, device="cuda")).sum().backward()
    return [p.grad is not None for p in net.parameters()]


@check
def decompositions_and_transforms() -> Any:
    """Libraries that the dry GPU has not got: results are allocated, workspaces are named."""
    from pytest_vram.drygpu import notes

    x = torch.randn(4, 16, 16, device="cuda", requires_grad=True)
    singular = torch.linalg.svd(x)[1].sum() + torch.linalg.qr(x)[0].sum() + torch.linalg.inv(x).sum()
    solved = torch.linalg.solve(x, x).sum() + torch.linalg.det(x).sum() + torch.linalg.eigvalsh(x @ x.mT).sum()
    waves = torch.fft.irfft(torch.fft.rfft(x)).sum() + torch.fft.fft(x).abs().sum()
    (singular + solved + waves).backward()
    return {"gradient": list(x.grad.shape), "noted": [note.name for note in notes.so_far()]}  # type: ignore[union-attr]  # a gradient is there after backward


@check
def profiler() -> Any:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.ones(1000, device="cuda")
    return max(event.device_memory_usage for event in profile.key_averages())


check.run()
