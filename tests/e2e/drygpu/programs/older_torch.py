"""Runs another program as on torch 2.6 to 2.8: kernels are not handed out, reductions' operations not readable."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

(finder,) = (finder for finder in sys.meta_path if type(finder).__name__ == "TorchFinder")
install = finder._action


def as_older() -> None:
    import torch

    from pytest_vram.drygpu.values import collectives

    if hasattr(torch.library, "get_kernel"):
        del torch.library.get_kernel
    version, torch.__version__ = torch.__version__, "2.8.0"
    collectives._SUM = -1  # no operation that is read from the object is a sum
    install()
    torch.__version__ = version


finder._action = as_older
del sys.argv[0]
runpy.run_path(str(Path(__file__).with_name(sys.argv[0])), run_name="__main__")
