"""Lets PyTorch's autograd threads finish before the interpreter goes.

``backward()`` returns when the gradients are there; the autograd thread of each device may then still be letting go of
the graph, for which it needs the interpreter lock. If the script ends at that moment, Python ends the thread instead,
and the process aborts (see ``native/exit.c``, which keeps that from doing harm where this module is not loaded). Each
such thread works through its queue in order, so one more, empty, backward pass per device is a barrier.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import sys
from pathlib import Path


@functools.cache
def quiesce_at_exit() -> None:
    """Register :func:`quiesce` to run when the interpreter exits, once."""
    atexit.register(quiesce)


def quiesce() -> None:
    """Wait until the autograd threads have let go of all graphs. Does nothing if there are none."""
    torch = sys.modules.get("torch")
    if torch is None or not _autograd_threads():
        return
    # At exit nothing may fail: a device that is full to the last byte has no room for the barrier's 512 bytes.
    with contextlib.suppress(RuntimeError), torch.inference_mode(mode=False), torch.enable_grad():
        for device in range(torch.cuda.device_count()):
            leaf = torch.zeros(1, device=f"cuda:{device}", requires_grad=True)
            root = leaf.clone()
            gradient = torch.zeros_like(root)
            # Kept alive: the thread must not be the last to let go of anything that Python made.
            _kept.append((leaf, root, gradient))
            root.backward(gradient)


_kept: list[object] = []


def _autograd_threads() -> bool:
    """PyTorch names them ``pt_autograd_0`` and so on."""
    for comm in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):
            if comm.read_text().startswith("pt_autograd"):
                return True
    return False
