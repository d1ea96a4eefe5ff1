"""What cuDNN, torch.compile and the driver take on a dry GPU; each check prints what the test looks at."""

from __future__ import annotations

import json
import sys

import torch
from torch import nn

from pytest_vram.drygpu import driver


def convolutions() -> dict[str, object]:
    """A convolution there and back in fp32, and what each of its two passes took beyond its tensors."""
    layer = nn.Conv2d(64, 64, 3, padding=1, bias=False).cuda()
    images = torch.randn(8, 64, 56, 56, device="cuda", requires_grad=True)
    held = torch.cuda.memory_allocated()
    out = layer(images)
    forward = torch.cuda.max_memory_allocated() - held - out.nbytes
    out.sum().backward()
    return {"forward": forward, "peak": torch.cuda.max_memory_allocated()}


def benchmarked() -> dict[str, object]:
    torch.backends.cudnn.benchmark = True
    return convolutions()


def weight_gradient() -> dict[str, object]:
    """The workspace of one weight gradient of VGG-16, whose plan computes parts of the sum at the same time."""
    layer = nn.Conv2d(512, 512, 3, padding=1, bias=False).cuda()
    images = torch.randn(32, 512, 28, 28, device="cuda")
    out = layer(images)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() + layer.weight.nbytes
    out.backward(images)
    return {"workspace": torch.cuda.max_memory_allocated() - held}


def recurrent() -> dict[str, object]:
    """Every kind of recurrent layer there and back; bytes that the forward pass of an LSTM and a plain layer need."""
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        for settings in ({}, {"bidirectional": True}, {"bias": False}, {"dropout": 0.2}):
            layer = kind(96, 160, 2, **settings).cuda()
            packed = nn.utils.rnn.pack_padded_sequence(
                torch.randn(20, 4, 96, device="cuda"), torch.tensor([20, 9, 3, 1])
            )
            layer(packed)[0].data.sum().backward()
    half = nn.LSTM(128, 128).to("cuda", torch.half)
    half(torch.randn(20, 4, 128, device="cuda", dtype=torch.half))[0].sum().backward()
    nn.LSTM(96, 160, proj_size=32).cuda()(torch.randn(20, 4, 96, device="cuda"))[0].sum().backward()
    plain, rows = nn.RNN(512, 1024).cuda(), torch.randn(128, 32, 512, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    plain(rows)
    needed = torch.cuda.max_memory_allocated() - held
    layer = nn.LSTM(512, 1024, 2, batch_first=True).cuda()
    rows = torch.randn(64, 256, 512, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    out = layer(rows)[0]
    kept = torch.cuda.memory_allocated() - held - out.nbytes
    return {
        "weights": layer._flat_weights[0]._base is None,
        "kept": kept,
        "peak": torch.cuda.max_memory_allocated() - held,
        "plain": needed,
    }


def compiled() -> dict[str, object]:
    """A product whose columns are not aligned, compiled: what its padded copy takes."""
    from torch._inductor import utils

    layer = torch.compile(nn.Linear(1024, 2047, bias=False).to("cuda", torch.bfloat16))
    with torch.no_grad():
        layer(torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16))
    return {"tflops": utils.get_device_tflops(torch.bfloat16)}


def context() -> dict[str, object]:
    """The context after each first use, and what the driver says is free while managed memory is held."""
    torch.cuda.init()
    free, _ = torch.cuda.mem_get_info()
    idle = driver.stats().context_bytes
    a = torch.ones(64, 64, device="cuda")
    elementwise = driver.stats().context_bytes
    a @ a
    products = driver.stats().context_bytes
    a @ a
    return {
        "idle": idle,
        "elementwise": elementwise,
        "products": products,
        "again": driver.stats().context_bytes,
        "free": free,
        "total": driver.stats().total_bytes,
    }


def managed() -> dict[str, object]:
    import ctypes

    torch.cuda.init()
    before, _ = torch.cuda.mem_get_info()
    library, pointer = ctypes.CDLL(None), ctypes.c_void_p()
    assert library.cudaMallocManaged(ctypes.byref(pointer), ctypes.c_size_t(1 << 30), ctypes.c_uint(1)) == 0
    held, _ = torch.cuda.mem_get_info()
    peak = driver.stats().peak_bytes
    assert library.cudaMallocManaged(ctypes.byref(pointer), ctypes.c_size_t(1 << 38), ctypes.c_uint(1)) == 0
    full, _ = torch.cuda.mem_get_info()
    return {"held": before - held, "peak": peak, "full": full}


def addresses() -> dict[str, object]:
    """Segments of one size, in the order in which they were made."""
    blocks = [torch.empty(32 << 20, dtype=torch.uint8, device="cuda") for _ in range(4)]
    return {"addresses": [block.data_ptr() for block in blocks]}


def timed() -> dict[str, object]:
    """The time between events, of the same work twice, and of more work."""
    x = torch.ones(16, device="cuda")

    def time_of(kernels: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(kernels):
            x.sin()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return {"times": [time_of(3), time_of(3), time_of(9), time_of(0)]}


if __name__ == "__main__":
    found = globals()[sys.argv[1]]()
    print(json.dumps({**found, "notes": driver.notes(), "missing": driver.missing_functions()}))
