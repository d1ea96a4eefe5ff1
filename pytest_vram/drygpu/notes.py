"""Collect the assumptions behind a dry GPU's figures: those of the stub libraries and of substituted operators.

Each assumption is counted every time it is made, so that a test's assumptions can be told from those of earlier tests.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pytest_vram.drygpu import driver
from pytest_vram.memory.note import Note, merged

if TYPE_CHECKING:
    from collections.abc import Mapping

_lock = threading.Lock()
_made: dict[Note, int] = {}


def assume(name: str, text: str, *, source: str = "operators", size: int = 0, latest: bool = False) -> None:
    """Count an assumption that is made now.

    Args:
        name: see :class:`pytest_vram.memory.Note`, as for ``text`` and ``source``.
        size: bytes of what the assumption is about.
        latest: the text contains a figure that grows: it takes the place of earlier texts of this name.
    """
    # Sizes are rounded up to a sixteenth, so that a program of many shapes makes few notes.
    unit = 1 << max(size.bit_length() - 5, 0)
    note = Note(name=name, text=text, source=source, size_bytes=size if latest else -(-size // unit) * unit)
    with _lock:
        if latest and note not in _made:
            for earlier in [made for made in _made if made.name == name]:
                del _made[earlier]
        _made[note] = _made.get(note, 0) + 1


def collect() -> dict[Note, int]:
    """Return how often this process made each assumption, a key for each size, in the order of first occurrence."""
    counts = driver.note_counts() if driver.is_active() else {}
    found = {_of_driver(text, size): count for (text, size), count in counts.items()}
    with _lock:
        return found | _made


def since(earlier: Mapping[Note, int]) -> tuple[Note, ...]:
    """Return the assumptions that were made after ``earlier = collect()``, each with its largest size."""
    return merged(note for note, count in collect().items() if count > earlier.get(note, 0))


def so_far() -> tuple[Note, ...]:
    """Return the assumptions that this process has made, each with its largest size."""
    return since({})


def reset() -> None:
    """Forget the operators' assumptions in a forked child, with a new lock: the parent may have held the old one."""
    global _lock
    _lock = threading.Lock()
    _made.clear()


def _of_driver(text: str, size: int) -> Note:
    """Convert a note of the stub libraries, which has the form ``name: text``."""
    name, separator, rest = text.partition(": ")
    if not separator:
        name, rest = "driver", text
    return Note(name=name, text=rest, source="driver", size_bytes=size)
