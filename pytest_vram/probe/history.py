"""Torch's memory history: recorded while a test runs, and the user's line in each of its stacks."""

from __future__ import annotations

import contextlib
import functools
import os
import sysconfig
import weakref
from typing import TYPE_CHECKING, Any

from pytest_vram import torch_private
from pytest_vram.memory import Note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

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
        self._mine = self._wanted = self._lost = False

    def start(self) -> None:
        """Begin to record."""
        import torch

        self._wanted = True
        _watch()
        _started.add(self)
        if torch.cuda.is_initialized() or torch_private.cuda_is_starting():
            self._begin()
        else:  # a context takes hundreds of megabytes of a card: the program under test makes it, or nobody
            torch_private.when_cuda_starts(self._begin)

    def _begin(self) -> None:
        # Asked only once there is an allocator: before, the question ends the process.
        if not self._wanted or torch_private.history_is_on():
            return
        self._mine = True
        with _by_us():
            torch_private.record_history(MAX_EVENTS, enabled="all", context="alloc")

    def stop(self) -> None:
        """Stop recording, and forget what was recorded."""
        self._wanted = False
        _started.discard(self)
        if self._mine and not self._lost:
            with _by_us():
                torch_private.end_history()
        self._mine = False

    def lose(self) -> None:
        """The program under test has stopped or cleared torch's history, of which there is one."""
        self._lost = True

    def lost(self) -> bool:
        """Whether the program under test has stopped or cleared torch's history since ``start``."""
        return self._lost

    def notes(self) -> tuple[Note, ...]:
        """What to tell of the record: nothing where it is whole."""
        return (LOST,) if self._lost else ()


LOST = Note(
    name="memory history",
    text="the program called torch.cuda.memory._record_memory_history itself, which ended the recording of allocations;"
    " who held the peak and memory over time are left out",
    source="recorder",
    figures=False,
)
_started: weakref.WeakSet[History] = weakref.WeakSet()
_ours = [0]  # calls of ours that are under way


@contextlib.contextmanager
def _by_us() -> Iterator[None]:
    _ours[0] += 1
    try:
        yield
    finally:
        _ours[0] -= 1


@functools.cache
def _watch() -> None:
    """Hear of everybody who sets torch's history, from now on."""
    for name in torch_private.HISTORY_SETTERS:
        torch_private.put_around(name, lambda original: functools.partial(_set, original))


def _set(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _ours[0] or not _started:
        return original(*args, **kwargs)
    before = _recorded_events()
    result = original(*args, **kwargs)
    after = _recorded_events()
    if after is None or (before is not None and after < before):
        for history in tuple(_started):
            history.lose()
    return result


def _recorded_events() -> int | None:
    """How many events torch's history holds; ``None`` where it does not record."""
    import torch

    # Before there is an allocator, the question ends the process.
    if not torch.cuda.is_initialized() or not torch_private.history_is_on():
        return None
    return sum(len(trace) for trace in torch_private.memory_snapshot()["device_traces"])


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
