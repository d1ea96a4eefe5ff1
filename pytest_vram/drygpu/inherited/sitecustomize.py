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


_run_the_other_one()
try:
    from pytest_vram.drygpu.startup import watch
except ImportError:
    pass  # another environment's Python: it has dry GPUs, but nothing carries their values
else:
    watch()
