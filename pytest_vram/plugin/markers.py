"""Turns ``@pytest.mark.vram(...)`` into a Budget, and checks it at collection."""

from __future__ import annotations

import difflib
import math
import typing
from typing import TYPE_CHECKING, Any

from pytest_vram import units
from pytest_vram.errors import VramUsageError
from pytest_vram.memory import Budget, Metric, Ranks, Scope

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pytest

MARK = "vram"
VALUES_MARK = "vram_values"
RANKS_MARK = "vram_ranks"
METRICS = typing.get_args(Metric)
SCOPES = typing.get_args(Scope)
RANKS = typing.get_args(Ranks)


def parse(mark: pytest.Mark, *, default_max_bytes: int | None, where: str) -> Budget:
    """Return the budget that a marker declares.

    Args:
        mark: the test's nearest ``vram`` marker.
        default_max_bytes: the limit if the marker names none (``vram_max_gb`` of the ini file); ``None`` for no limit.
        where: the location shown in messages.

    Raises:
        VramUsageError: if an argument has a wrong name, type, unit or sign.
    """
    if mark.args:
        raise VramUsageError(
            f"vram({', '.join(map(repr, mark.args))}) takes no positional arguments, because the number could mean"
            " two things: write max_gb=... for the most memory that the test may use, or min_free_gb=... for what"
            " must be free for it to run"
        )
    arguments = dict(mark.kwargs)
    if unknown := [name for name in arguments if name not in _READERS]:
        near = difflib.get_close_matches(unknown[0], _READERS, n=2)
        hint = f": did you mean {' or '.join(near)}?" if near else "."
        raise VramUsageError(f"vram() has no argument {unknown[0]!r}{hint} It takes {', '.join(_READERS)}")
    if "max_gb" in arguments and "max_mb" in arguments:
        raise VramUsageError("vram(max_gb=..., max_mb=...) gives two limits: use one of them")
    read = {name: _READERS[name](name, value) for name, value in arguments.items()}
    limit = read.get("max_gb", read.get("max_mb"))
    return Budget(
        limit_bytes=default_max_bytes if limit is None else limit,
        metric=read.get("metric", "allocated"),
        scope=read.get("scope", "test"),
        device=read.get("device"),
        enforce=read.get("enforce", False),
        max_leak_bytes=read.get("max_leak_mb"),
        min_free_bytes=read.get("min_free_gb"),
        max_host_bytes=read.get("max_host_gb"),
        search=read.get("search", False),
        ranks=read.get("ranks", "card"),
        origin="marker",
        where=where,
    )


def limit_bytes(name: str, value: Any, *, unit: int, zero: bool = False) -> int:
    """Return a limit in bytes.

    Raises:
        VramUsageError: if the value is not a finite number, or not positive (with ``zero``: if it is negative).
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        number = "a number, without quotes" if isinstance(value, str) else "a number"
        raise VramUsageError(f"{name}={value!r}: write {number}, such as {name}=16")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise VramUsageError(f"{name}={value!r}: must be {'0 or more' if zero else 'above 0'}, and finite")
    return round(value * unit)


def _gb(name: str, value: Any) -> int:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 2**20:
        raise VramUsageError(f"{name}={value!r}: that many gigabytes? {name} counts in GB; use max_mb for megabytes")
    return limit_bytes(name, value, unit=units.GIB)


def _optional(read: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else read(name, value)


def _choice(choices: tuple[str, ...]) -> Callable[[str, Any], str]:
    def read(name: str, value: Any) -> str:
        if value not in choices:
            raise VramUsageError(f"{name}={value!r}: choose {', '.join(map(repr, choices))}")
        return str(value)

    return read


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise VramUsageError(f"{name}={value!r}: choose True or False")
    return value


def _device(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise VramUsageError(f"{name}={value!r}: write the device's index, 0 or more, as in cuda:0")
    return value


_READERS: Mapping[str, Callable[[str, Any], Any]] = {
    "max_gb": _optional(_gb),
    "max_mb": _optional(lambda name, value: limit_bytes(name, value, unit=units.MIB)),
    "metric": _choice(METRICS),
    "scope": _choice(SCOPES),
    "enforce": _flag,
    "max_leak_mb": _optional(lambda name, value: limit_bytes(name, value, unit=units.MIB, zero=True)),
    "min_free_gb": _optional(_gb),
    "max_host_gb": _optional(_gb),
    "device": _optional(_device),
    "search": _flag,
    "ranks": _choice(RANKS),
}


def concern(item: pytest.Item) -> bool:
    """Return whether a test uses this plugin, by a marker or by the fixtures ``gpu`` or ``vram``."""
    if {"vram", "gpu"} & set(getattr(item, "fixturenames", ())):
        return True
    return any(item.get_closest_marker(mark) is not None for mark in (MARK, VALUES_MARK, RANKS_MARK))
