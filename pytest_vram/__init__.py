"""Budgets for GPU memory in pytest, and dry runs of PyTorch programs on a machine without a GPU.

Importing this package imports neither torch nor pytest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_vram.errors import VramBudgetExceeded, VramError, VramLeak, VramRegression, VramUnmeasured
    from pytest_vram.report.files import load_report

__version__ = "0.1.0"

_WHERE = {
    "VramBudgetExceeded": "pytest_vram.errors",
    "VramError": "pytest_vram.errors",
    "VramLeak": "pytest_vram.errors",
    "VramRegression": "pytest_vram.errors",
    "VramUnmeasured": "pytest_vram.errors",
    "load_report": "pytest_vram.report.files",
}

__all__ = [
    "VramBudgetExceeded",
    "VramError",
    "VramLeak",
    "VramRegression",
    "VramUnmeasured",
    "__version__",
    "load_report",
]


def load_ipython_extension(ipython: Any) -> None:
    """Add the magics ``%%vram`` and ``%vram_dry`` to a notebook; ``%load_ext pytest_vram`` calls this."""
    importlib.import_module("pytest_vram.notebook").load(ipython)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
