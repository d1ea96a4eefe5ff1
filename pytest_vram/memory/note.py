"""An assumption that figures rest on. Every report that shows the figures shows it."""

from __future__ import annotations

from dataclasses import dataclass
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
    """

    name: str
    text: str
    source: str
    figures: bool = True


def note_lines(notes: Iterable[Note]) -> list[str]:
    """Return one line for each text: ``NAME, NAME: text``. Names that share a text share a line."""
    names: dict[str, dict[str, None]] = {}
    for note in notes:
        names.setdefault(note.text, {})[note.name] = None
    return [f"{', '.join(found)}: {text}" for text, found in names.items()]
