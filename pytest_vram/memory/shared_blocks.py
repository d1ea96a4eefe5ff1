"""Memory blocks that streams share, and how much more of them a card holds whose streams lag behind the program."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_vram.memory.note import Note

NAME = "blocks shared between streams"
_BEFORE = "each is reused as soon as the program frees it; a card whose streams lag behind reserves up to "
_AFTER = " bytes more"


def text(size: int) -> str:
    """Return the text of the note: a card may need ``size`` bytes more."""
    return f"{_BEFORE}{size:,}{_AFTER}"


def bytes_more(note: Note) -> int:
    """Return the bytes that a note of :func:`text` names, and 0 for any other note."""
    if note.name != NAME or not (note.text.startswith(_BEFORE) and note.text.endswith(_AFTER)):
        return 0
    return int(note.text[len(_BEFORE) : -len(_AFTER)].replace(",", ""))
