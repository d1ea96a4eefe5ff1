"""Record torch's memory history while a test runs, and find the user's line of code in its stack traces."""

from __future__ import annotations

import contextlib
import functools
import os
import sysconfig
import weakref
from typing import TYPE_CHECKING, Any

from pytest_vram.memory import Note
from pytest_vram.memory.code_names import code_name, is_typed_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

MAX_EVENTS = 1_000_000
BACKWARD = "backward pass"
"""The location shown for what autograd's own thread allocated, mostly gradients."""
_LIBRARIES = tuple(
    os.path.join(path, "")
    for path in sorted({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")}, key=len, reverse=True)
)
"""Library folders, the longest path first: some systems have a virtual environment inside the standard library's."""
_OURS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")


class History:
    """Records allocations with their Python stacks, unless the program under test does so itself.

    ``benchmarks/plugin_overhead.py recorded`` measures the cost of recording. Reading the history costs far more, so
    only failures read it.
    """

    def __init__(self) -> None:
        self._mine = self._wanted = self._lost = False

    def start(self) -> None:
        """Begin to record."""
        import torch

        self._wanted = True
        _watch()
        _started.add(self)
        if torch.cuda.is_initialized() or hasattr(torch.cuda._tls, "is_initializing"):
            self._begin()
        else:  # creating a context takes hundreds of megabytes of a card, so this is left to the program under test
            torch.cuda._lazy_call(self._begin)

    def _begin(self) -> None:
        import torch

        # Without an allocator, _cuda_isHistoryEnabled would end the process; this runs once there is one.
        if not self._wanted or torch._C._cuda_isHistoryEnabled():
            return
        self._mine = True
        with _by_us():
            torch.cuda.memory._record_memory_history(
                enabled="all", context="alloc", stacks="python", max_entries=MAX_EVENTS
            )

    def stop(self) -> None:
        """Stop recording, and forget what was recorded."""
        self._wanted = False
        _started.discard(self)
        if self._mine and not self._lost:
            import torch

            with _by_us():
                torch.cuda.memory._record_memory_history(enabled=None)
        self._mine = False

    def lose(self) -> None:
        """Note that the program under test has stopped or cleared torch's history; a process has only one."""
        self._lost = True

    def lost(self) -> bool:
        """Whether the program under test has stopped or cleared torch's history since ``start``."""
        return self._lost

    def notes(self) -> tuple[Note, ...]:
        """Return a note if the recording is incomplete."""
        return (LOST,) if self._lost else ()


LOST = Note(
    name="memory history",
    text="the program called torch.cuda.memory._record_memory_history itself, which ended the recording of allocations;"
    " who held the peak and memory over time are left out",
    source="recorder",
    figures=False,
)
_started: weakref.WeakSet[History] = weakref.WeakSet()
_ours = [0]  # number of calls by this package that are in progress
_SETTERS = ("_cuda_record_memory_history", "_cuda_record_memory_history_legacy")
"""The functions that torch.cuda.memory._record_memory_history calls in torch 2.6 to 2.15."""


@contextlib.contextmanager
def _by_us() -> Iterator[None]:
    _ours[0] += 1
    try:
        yield
    finally:
        _ours[0] -= 1


@functools.cache
def _watch() -> None:
    """Patch torch to notice every call that starts, stops or clears its memory history."""
    import torch

    for name in _SETTERS:
        original = getattr(torch._C, name, None)
        if original is not None:
            setattr(torch._C, name, functools.partial(_set, original))


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
    """Return the number of events in torch's history; None if it is not recording."""
    import torch

    # Without an allocator, _cuda_isHistoryEnabled would end the process.
    if not torch.cuda.is_initialized() or not torch._C._cuda_isHistoryEnabled():
        return None
    return sum(len(trace) for trace in torch._C._cuda_memorySnapshot(None)["device_traces"])


def user_line(frames: Iterable[Mapping[str, Any]]) -> str:
    """Return ``file:line in function`` of the innermost frame in the user's code.

    Without such a frame, it is the innermost frame of a library. If the stack has no frame outside of this package, as
    in autograd's thread, the result is ``backward pass``.
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
    """Whether code is the user's: of a file outside the libraries and this package, or typed in, but not generated."""
    return is_typed_in(filename) or not filename.startswith((*_LIBRARIES, _OURS, "<"))


def _short(path: str) -> str:
    """Return a path relative to the working directory (``train.py``) or the libraries' folder (``peft/model.py``).

    A notebook's cell has its own name.
    """
    if (name := code_name(path)) is not None:
        return name
    for prefix in (*_LIBRARIES, os.path.join(os.getcwd(), "")):
        if path.startswith(prefix):
            return path[len(prefix) :]
    return path
