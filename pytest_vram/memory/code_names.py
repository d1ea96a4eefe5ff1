"""The names that reports use for a program's code: the path of its file, or what a notebook calls a cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_TYPED_IN = ("<stdin>", "<ipython-input", "<python-input")
"""How the names begin that interpreters give to typed code. Generated code has other names in angle brackets."""

_namers: list[Callable[[str], str | None]] = []


def is_typed_in(filename: str) -> bool:
    """Whether a code object's file name stands for code that a user typed into an interpreter."""
    return filename.startswith(_TYPED_IN)


def add_namer(namer: Callable[[str], str | None]) -> None:
    """Let ``namer`` name code in reports.

    Args:
        namer: takes a code object's file name, and returns the name to show; ``None`` if it knows no better one.
    """
    _namers.append(namer)


def code_name(filename: str) -> str | None:
    """Return the name that a namer gives to a code object's file name; ``None`` if none of them knows it."""
    return next((name for namer in _namers if (name := namer(filename)) is not None), None)
