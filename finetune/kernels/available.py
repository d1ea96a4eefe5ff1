"""Where kernels that are written in Triton run."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


@functools.cache
def kernel_runs_on(device: torch.device) -> bool:
    """Whether the kernel can be used there: on a CUDA card with Triton, on a CPU under Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
