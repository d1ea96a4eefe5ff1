"""An assumption that figures rest on. Every report that shows the figures shows it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One assumption behind a measurement.

    Attributes:
        name: a short name that is the same in every run, such as ``cuDNN execution plans``.
        text: the assumption, worded so that it completes a sentence that begins with the name.
        source: the part that makes the assumption: ``driver`` (a stub library of the dry GPU), ``operators`` (an
            operator whose library the dry GPU lacks), ``recorder`` (the plugin's recording of allocations).
        figures: whether the peaks rest on it; false if only details do, such as which line of code held the peak.
        size_bytes: what the assumption is about, where it has a size: the largest workspace, or the blocks that streams
            share. The bounds of a figure follow from it.
    """

    name: str
    text: str
    source: str
    figures: bool = True
    size_bytes: int = 0


def merged(notes: Iterable[Note]) -> tuple[Note, ...]:
    """Return each assumption once, with its largest size, in the order of first occurrence."""
    found: dict[Note, Note] = {}
    for note in notes:
        key = without_size(note)
        if key not in found or found[key].size_bytes < note.size_bytes:
            found[key] = note
    return tuple(found.values())


def without_size(note: Note) -> Note:
    """Return the assumption itself, which tests make about sizes of their own."""
    return replace(note, size_bytes=0)


def note_lines(notes: Iterable[Note]) -> list[str]:
    """Return one line for each text: ``NAME, NAME: text``. Names that share a text share a line."""
    names: dict[str, dict[str, None]] = {}
    for note in notes:
        names.setdefault(note.text, {})[note.name] = None
    return [f"{', '.join(found)}: {text}" for text, found in names.items()]
