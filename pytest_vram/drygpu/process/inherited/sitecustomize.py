"""Run by every Python process that inherits a dry GPU, so that values are carried as in the parent process."""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


def _run_the_other_one() -> None:
    """Run the ``sitecustomize`` that this folder hides, because Python runs only the first one."""
    import importlib.machinery
    import importlib.util

    others = [entry for entry in sys.path if os.path.abspath(entry or ".") != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _torch_is_there() -> None:
    try:
        from pytest_vram.drygpu.process.startup import torch_is_there
    except ImportError:
        return  # the Python of another environment, without this package: its dry GPUs carry no values
    torch_is_there()


def _datasets_is_there() -> None:
    try:
        from pytest_vram.standins.data_sets import install
    except ImportError:
        return
    install()


def _hub_is_there() -> None:
    try:
        from pytest_vram.standins.revisions import install
    except ImportError:
        return
    install()


def _watch() -> None:
    """Load torch_import.py by its path. pytest warns if a plugin's package is imported before it rewrites asserts."""
    import importlib.util

    path = os.path.join(os.path.dirname(_HERE), "torch_import.py")
    spec = importlib.util.spec_from_file_location("_pytest_vram_torchimport", path)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.after_torch(_torch_is_there)
        if os.environ.get("PYTEST_VRAM_ROWS") or os.environ.get("PYTEST_VRAM_DATA"):
            module.after_import("datasets", _datasets_is_there)
        if os.environ.get("PYTEST_VRAM_MODELS"):
            module.after_import("huggingface_hub", _hub_is_there)


_run_the_other_one()
_watch()
