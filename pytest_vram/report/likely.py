"""The bounds of a peak that rests on a guess, and what they are taken from, in the words of every report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_vram.memory import spread_of
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_vram.memory import Note, Spread
    from pytest_vram.report.rows import Row

TITLE = "peaks that rest on a guess, and their bounds:"


def spread(row: Row) -> Spread | None:
    """Return the bounds of a test's peak; None if it was not measured, or nothing tells how far off it is."""
    if row.peak_bytes is None:
        return None
    return spread_of(row.peak_bytes, row.notes, allocated=row.metric == "allocated")


def on_device(device_bytes: int, context_bytes: int, notes: Iterable[Note]) -> Spread | None:
    """Return the bounds of all that a card holds. The assumptions do not change the context.

    Args:
        device_bytes: the peak on the device, context included.
        context_bytes: the context's part of it.
        notes: the assumptions behind the peak.
    """
    found = spread_of(device_bytes - context_bytes, notes)
    return None if found is None else found.shifted(context_bytes)


def words(found: Spread) -> str:
    """Return a text such as ``between 4.00 GiB and 4.24 GiB, as far off as measured runs were``.

    Bounds that read the same as text are written once: ``about 435 MiB, as far off as measured runs were``.
    """
    low, high = format_bytes(found.low), format_bytes(found.high)
    return f"{f'about {low}' if low == high else f'between {low} and {high}'}, {found.basis}"


def verdict(found: Spread, limit: int) -> str:
    """Return ``, so that the verdict is only likely`` if the limit lies between the bounds."""
    return ", so that the verdict is only likely" if found.straddles(limit) else ""


def lines(table: Iterable[Row]) -> list[tuple[str, str]]:
    """Return each test whose peak has bounds, with its peak, the bounds and what they mean for its budget."""
    found = []
    for row in table:
        bounds = spread(row)
        if bounds is not None:
            so = "" if row.budget_bytes is None else verdict(bounds, row.budget_bytes)
            found.append((row.nodeid, f"{format_bytes(bounds.expected)}, likely {words(bounds)}{so}"))
    return found
