"""Torch's memory history: recorded while a test runs, and the user's line in each of its stacks."""

from __future__ import annotations

import os
import sysconfig
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MAX_EVENTS = 1_000_000
BACKWARD = "backward pass"
"""Place of what autograd's own thread allocated: gradients, mostly."""
_LIBRARIES = tuple(
    os.path.join(path, "")
    for path in sorted({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")}, key=len, reverse=True)
)
"""The longest first: a virtual environment's lie below the standard library's on some systems."""
_OURS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")


class History:
    """Records allocations with their Python stacks, unless the program under test does so itself.

    What it costs while it runs is what ``benchmarks/plugin_overhead.py recorded`` prints; reading costs far more, and
    is for failures.
    """

    def __init__(self) -> None:
        self._mine = self._wanted = False

    def start(self) -> None:
        """Begin to record."""
        import torch

        self._wanted = True
        if torch.cuda.is_initialized() or hasattr(torch.cuda._tls, "is_initializing"):
            self._begin()
        else:  # a context takes hundreds of megabytes of a card: the program under test makes it, or nobody
            torch.cuda._lazy_call(self._begin)

    def _begin(self) -> None:
        import torch

        # Asked only once there is an allocator: before, the question ends the process.
        if not self._wanted or torch._C._cuda_isHistoryEnabled():
            return
        self._mine = True
        torch.cuda.memory._record_memory_history(
            enabled="all", context="alloc", stacks="python", max_entries=MAX_EVENTS
        )

    def stop(self) -> None:
        """Stop recording, and forget what was recorded."""
        self._wanted = False
        if self._mine:
            import torch

            torch.cuda.memory._record_memory_history(enabled=None)
            self._mine = False


def user_line(frames: Iterable[Mapping[str, Any]]) -> str:
    """``file:line in function`` of the innermost frame that is neither a library's nor this package's.

    Without one, of the innermost library's; ``backward pass`` where autograd's thread ran nothing of Python but this
    package.
    """
    fallback = ""
    for frame in frames:
        name = frame["filename"]
        place = f"{_short(name)}:{frame['line']} in {frame['name']}"
        if not fallback and not name.startswith(_OURS):
            fallback = place
        if is_users(name):
            return place
    return fallback or BACKWARD


def is_users(filename: str) -> bool:
    """Whether a file is neither a library's, nor this package's, nor made up."""
    return not filename.startswith((*_LIBRARIES, _OURS, "<"))


def _short(path: str) -> str:
    """``train.py`` for a file below the working directory, ``peft/tuners/lora/bnb.py`` for a library's."""
    for prefix in (*_LIBRARIES, os.path.join(os.getcwd(), "")):
        if path.startswith(prefix):
            return path[len(prefix) :]
    return path
