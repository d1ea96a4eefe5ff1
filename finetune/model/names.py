"""Decides which layers a name of ``--targets`` or ``--exclude`` stands for, from the paths of the layers alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

ALL_LINEAR = "all-linear"
"""The name that stands for every linear layer that can have an adapter."""


def wanted(path: str, targets: Iterable[str], exclude: Iterable[str]) -> bool:
    """Return whether the settings give the layer at ``path`` an adapter, judging by its name alone."""
    named = any(target == ALL_LINEAR or matches(target, path) for target in targets)
    return named and not any(matches(name, path) for name in exclude)


def matches(name: str, path: str) -> bool:
    """Return whether a name of ``--targets`` or ``--exclude`` stands for the layer at ``path``.

    A name is that of a layer or of a module around it: one or several parts of the path (``q_proj``, ``mlp``,
    ``layers.0``). A name with characters that no path has is a regular expression over the whole path.
    """
    if re.fullmatch(r"[\w.\-]+", name):
        return f".{name}." in f".{path}."
    return why_no_expression(name) is None and re.fullmatch(name, path) is not None


def why_no_expression(name: str) -> str | None:
    """Return why a name with characters that no path has is not a regular expression; None if it is one."""
    try:
        re.compile(name)
    except re.error as error:
        return str(error)
    return None


def names_of(without: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return the shortest names for ``--exclude`` that match every path of ``without`` and none of ``others``."""
    rest, others = list(without), list(others)
    found: list[str] = []
    while rest:
        parts = rest[0].split(".")
        spans = [
            (end - begin, -end, begin, end) for begin in range(len(parts)) for end in range(begin + 1, len(parts) + 1)
        ]
        names = [".".join(parts[begin:end]) for *_, begin, end in sorted(spans) if not parts[begin].isdigit()]
        name = next((n for n in names if not any(matches(n, path) for path in others)), rest[0])
        found.append(name)
        rest = [path for path in rest if not matches(name, path)]
    return found
