"""Found by every Python process that inherits a dry GPU: its values are carried as in the process that activated it."""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


def _run_the_other_one() -> None:
    """Python runs one sitecustomize only: the one that this folder hides is run here."""
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
        return  # another environment's Python: it has dry GPUs, but nothing carries their values
    torch_is_there()


def _watch() -> None:
    """Without importing the package: pytest wants to be the first to import what its plugins are made of."""
    import importlib.util

    path = os.path.join(os.path.dirname(_HERE), "torch_import.py")
    spec = importlib.util.spec_from_file_location("_pytest_vram_torchimport", path)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.after_torch(_torch_is_there)


_run_the_other_one()
_watch()
