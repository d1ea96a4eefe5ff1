"""Reads what another process with dry GPUs holds, from the page that ``drygpu/native/live.c`` writes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_MAGIC = b"vramdry1"
_HEAD = struct.Struct("<8sQ")
_CARD = struct.Struct("<QQQ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The memory that one process holds on one card, in bytes, including its context.

    Attributes:
        card: the card's number in the machine.
        used_bytes: the bytes that the process holds now, or held when it ended.
        peak_bytes: the most bytes that it held.
        context_bytes: the context's part of these bytes.
    """

    card: int
    used_bytes: int
    peak_bytes: int
    context_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One process's page: when it first used a card, in seconds since the machine started, and what it holds."""

    began: float
    held: tuple[Held, ...]


def read(path: Path) -> Page | None:
    """Return the page in the file ``path``, or None if there is none or it is not complete yet."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) < _HEAD.size:
        return None
    magic, began = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        return None
    held = []
    for card, offset in enumerate(range(_HEAD.size, len(data) - _CARD.size + 1, _CARD.size)):
        used, peak, context = _CARD.unpack_from(data, offset)
        if context or peak:
            held.append(Held(card=card, used_bytes=used, peak_bytes=peak, context_bytes=context))
    return Page(began=began / 1e9, held=tuple(held))
