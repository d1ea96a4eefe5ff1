"""Record torch's memory history while a test runs, and find the user's line of code in its stack traces."""

from __future__ import annotations

import contextlib
import functools
import weakref
from typing import TYPE_CHECKING, Any

from pytest_vram import torch_private
from pytest_vram.code_owner import Frame, innermost
from pytest_vram.memory import Note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

MAX_EVENTS = 1_000_000
BACKWARD = "backward pass"
"""The location shown for allocations in autograd's own thread, mostly gradients."""


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
        if torch.cuda.is_initialized() or torch_private.cuda_is_starting():
            self._begin()
        else:  # creating a context takes hundreds of megabytes of a card, so this is left to the program under test
            torch_private.when_cuda_starts(self._begin)

    def _begin(self) -> None:
        # history_is_on() would end the process if there were no allocator; this method runs only once there is one.
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
        """Note that the program under test has stopped or cleared torch's history; a process has only one."""
        self._lost = True

    def lost(self) -> bool:
        """Return whether the program under test has stopped or cleared torch's history since ``start``."""
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
    """Return the number of events in torch's history; None if it is not recording."""
    import torch

    # history_is_on() would end the process if there were no allocator.
    if not torch.cuda.is_initialized() or not torch_private.history_is_on():
        return None
    return sum(len(trace) for trace in torch_private.memory_snapshot()["device_traces"])


def user_line(frames: Iterable[Mapping[str, Any]]) -> str:
    """Return ``file:line in function`` of the innermost frame in the user's code.

    Without such a frame, it is the innermost frame of a library, or else of torch. If the stack has no frame outside of
    this package, as in autograd's thread, the result is ``backward pass``.

    Args:
        frames: a stack of torch's memory history, the innermost frame first.
    """
    user, library, torch = innermost(Frame(frame["filename"], frame["line"], frame["name"]) for frame in frames)
    found = user or library or torch
    return f"{found.place} in {found.function}" if found else BACKWARD
