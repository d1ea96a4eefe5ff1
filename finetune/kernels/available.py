"""Decides on which devices kernels that are written in Triton run."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vram.drygpu import is_active

if TYPE_CHECKING:
    import torch


@functools.cache
def kernel_runs_on(device: torch.device) -> bool:
    """Return whether kernels run on the device: a CUDA card with Triton, or a CPU with Triton's interpreter.

    On a card Triton has to compile its launcher as well, see :func:`can_launch`.
    """
    if not triton_is_installed():
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    import torch  # estimates use this module too, without torch

    return device.type == "cuda" and can_launch() and torch.cuda.get_device_capability(device) >= (7, 0)


def triton_is_installed() -> bool:
    """Return whether Triton is installed, as it is with PyTorch on Linux."""
    return importlib.util.find_spec("triton") is not None


def liger_is_installed() -> bool:
    """Return whether liger-kernel is installed."""
    return importlib.util.find_spec("liger_kernel") is not None


def can_launch() -> bool:
    """Return whether Triton can launch kernels on a card of this machine. At its first use it compiles a C module.

    This needs a C compiler (``CC``, gcc or clang) and Python's headers, which many containers lack. A dry GPU stands
    for another machine, so nothing is asked there.
    """
    return is_active() or _can_compile()


def _can_compile() -> bool:
    """Return whether Triton finds a compiler and Python.h, by the same search."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian has its own
    headers = Path(sysconfig.get_path("include", scheme), "Python.h")
    return any(shutil.which(name) for name in compilers) and headers.is_file()
