"""The formats of a row, by the columns that tell them apart, and what a value is in words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

FORMATS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt/completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""The row formats, and the columns by which each is recognised, in the order in which they are tried."""


SHOWN_CHARACTERS = 80


def is_format(columns: Collection[str]) -> bool:
    """Return whether the columns contain those of a format."""
    return any(set(needed) <= set(columns) for needed in FORMATS.values())


def holds(value: Any) -> bool:
    """Return whether a cell holds a value. Tables fill cells without one with None, empty text or NaN."""
    return not is_nothing(value) and value not in ("", [], {})


def is_nothing(value: Any) -> bool:
    """Return whether a value is None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def kind(value: Any) -> str:
    """Return what a value is, in words for an error message: ``a number``, ``a list``."""
    if is_nothing(value):
        return "nothing (null or NaN)"
    names: dict[type, str] = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "a mapping",
        bytes: "bytes",
    }
    return names.get(type(value), f"of type {type(value).__name__}")


def shown(text: str) -> str:
    """Return the first characters of a text, for an error message."""
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
