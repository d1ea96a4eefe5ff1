"""What the figures of a dry GPU rest on beyond PyTorch's own decisions: assumptions of the stub libraries and of the
operators that stand in for missing ones.

Every assumption counts how often it is made, so that those of one test are told apart from those of an earlier one.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pytest_vram.drygpu import driver
from pytest_vram.memory.note import Note

if TYPE_CHECKING:
    from collections.abc import Mapping

_lock = threading.Lock()
_made: dict[Note, int] = {}


def assume(name: str, text: str, *, source: str = "operators") -> None:
    """Record that an assumption is made now. See :class:`pytest_vram.memory.Note` for the arguments."""
    note = Note(name=name, text=text, source=source)
    with _lock:
        _made[note] = _made.get(note, 0) + 1


def collect() -> dict[Note, int]:
    """Return every assumption that this process has made, and how often, in the order of first occurrence."""
    found = {_of_driver(text): count for text, count in driver.note_counts().items()} if driver.is_active() else {}
    with _lock:
        return found | _made


def since(earlier: Mapping[Note, int]) -> tuple[Note, ...]:
    """Return the assumptions that were made after ``earlier = collect()``."""
    return tuple(note for note, count in collect().items() if count > earlier.get(note, 0))


def reset() -> None:
    """Forget what operators assumed, in a forked child: another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.Lock()
    _made.clear()


def _of_driver(text: str) -> Note:
    """The stubs write ``name: text``."""
    name, separator, rest = text.partition(": ")
    return Note(name=name, text=rest, source="driver") if separator else Note(name="driver", text=text, source="driver")
