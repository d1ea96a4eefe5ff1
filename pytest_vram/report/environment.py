"""Collect the versions and devices that a report was made with, without importing the packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import TYPE_CHECKING

from pytest_vram import __version__
from pytest_vram.memory import Device, Environment

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_vram.memory import TestRecord


def environment(tests: Iterable[TestRecord] = ()) -> Environment:
    """Return the versions in this process, and the devices in the records."""
    devices: dict[Device, None] = {}
    for test in tests:
        devices.update(dict.fromkeys(m.device for m in test.measurements))
    torch = sys.modules.get("torch")
    return Environment(
        python=platform.python_version(),
        pytest_vram=__version__,
        torch=_version("torch"),
        cuda=torch.version.cuda if torch is not None else None,
        allocator_conf=os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF"),
        devices=tuple(devices),
    )


def _version(package: str) -> str | None:
    loaded = sys.modules.get(package)
    if loaded is not None:
        return str(loaded.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
