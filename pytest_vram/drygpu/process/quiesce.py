"""Wait for PyTorch's autograd threads before the interpreter shuts down.

``backward()`` returns when the gradients are ready. The autograd thread of each device may then still be freeing the
graph, for which it needs the interpreter lock. If the script ends at that moment, Python ends the thread, and the
process aborts. ``native/exit.c`` prevents the abort in processes that do not load this module. Each thread processes
its queue in order, so waiting for one more small backward pass on each device waits for all earlier work.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import sys
from pathlib import Path


@functools.cache
def quiesce_at_exit() -> None:
    """Register :func:`quiesce` to run when the interpreter exits; further calls do nothing."""
    atexit.register(quiesce)


def quiesce() -> None:
    """Wait until the autograd threads have freed all graphs. Does nothing if there are no such threads."""
    torch = sys.modules.get("torch")
    if torch is None or not _autograd_threads():
        return
    # Nothing may fail at exit, but on a full device the 512 bytes of this backward pass cannot be allocated.
    with contextlib.suppress(RuntimeError), torch.inference_mode(mode=False), torch.enable_grad():
        for device in range(torch.cuda.device_count()):
            leaf = torch.zeros(1, device=f"cuda:{device}", requires_grad=True)
            root = leaf.clone()
            gradient = torch.zeros_like(root)
            # Kept alive, so that the thread is never the last owner of an object that Python created.
            _kept.append((leaf, root, gradient))
            root.backward(gradient)


_kept: list[object] = []


def _autograd_threads() -> bool:
    """Whether this process has autograd threads, which PyTorch names ``pt_autograd_0`` and so on."""
    for comm in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):
            if comm.read_text().startswith("pt_autograd"):
                return True
    return False
