"""Decides on which devices kernels that are written in Triton run."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


@functools.cache
def kernel_runs_on(device: torch.device) -> bool:
    """Return whether kernels run on the device: a CUDA card with Triton, or a CPU with Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
