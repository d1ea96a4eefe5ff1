"""torch.compile and a Triton kernel: compiled in earnest, launched, and of no effect."""

from __future__ import annotations

import json
import warnings

import torch
import triton
import triton.language as tl

from pytest_vram.drygpu import driver


@triton.jit
def double(source, target, count, block: tl.constexpr):
    offsets = tl.program_id(0) * block + tl.arange(0, block)
    mask = offsets < count
    tl.store(target + offsets, 2 * tl.load(source + offsets, mask=mask), mask=mask)


def gated(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.gelu(x) * y).sum(-1)


x = torch.randn(128, 512, device="cuda", requires_grad=True)
y = torch.randn(128, 512, device="cuda")
before = driver.work().launches
double[(triton.cdiv(y.numel(), 1024),)](y, torch.empty_like(y), y.numel(), block=1024)
launched = driver.work().launches - before
# A recurrent layer is not compiled. The operators that it calls are the dry GPU's, and must be left out as well.
warnings.filterwarnings("error", message=".*call_boxed")
layer = torch.nn.LSTM(16, 32).cuda()
torch.compile(layer)(torch.randn(5, 4, 16, device="cuda"))[0].sum().backward()


def peak(function: object) -> int:
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    function(x, y).sum().backward()
    x.grad = None
    return torch.cuda.max_memory_allocated() - held


eager = peak(gated)
compiled = torch.compile(gated)
peak(compiled)  # compiles
print(
    json.dumps(
        {
            "triton launches": launched,
            "eager": eager,
            "compiled": peak(compiled),
            "missing": driver.missing_functions(),
        }
    )
)
