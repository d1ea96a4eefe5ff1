"""Render a trend as text for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_vram.report.terminal import shorten
from pytest_vram.trend.growth import label, versions_changed
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_vram.trend.growth import Growth, PeakHistory, Trend

_BARS = "▁▂▃▄▅▆▇█"
_PARTS = 4
_GROWTHS = 5


def render(trend: Trend, *, width: int, between: Callable[[str, str], int | None] = lambda a, b: None) -> str:
    """Return the trend as text: for each test a line of bars, and the commits at which it grew.

    Args:
        trend: what to show.
        width: the columns of the terminal.
        between: returns how many commits lie between two; ``None`` if that is unknown.
    """
    lines: list[str] = []
    for series in trend.series:
        lines += [*_series(series, width, between), ""]
    if not trend.series:
        lines += ["no test was measured at a commit that is shown", ""]
    lines += [f"note: {remark}" for remark in trend.remarks]
    return "\n".join(lines).rstrip("\n")


def growth_text(growth: Growth, between: Callable[[str, str], int | None]) -> list[str]:
    """Return a growth as lines of text: where, by how much, since when, and what grew.

    Args:
        growth: the growth.
        between: returns how many commits lie between two; ``None`` if that is unknown.
    """
    after, before = growth.after, growth.before
    first, last = before.session.commit, after.session.commit
    count = between(first, last) if first and last else None
    unmeasured = max(0, (count or 0) - growth.passed)
    percent = f"{growth.percent:+.1f}%"
    sizes = f"{format_bytes(before.entry.peak_bytes)} -> {format_bytes(after.entry.peak_bytes)}"
    lines = [f"grew {percent} ({sizes}) at {label(after.session)} {after.session.subject}".rstrip()]
    lines.append(f"since {label(before.session)} {before.session.subject}".rstrip())
    if unmeasured:
        lines[-1] += f"; {unmeasured} commit{'s' * (unmeasured > 1)} between them not measured: --bisect finds the one"
    lines += [f"{name} {'+' if size > 0 else ''}{format_bytes(size)}" for name, size in growth.parts[:_PARTS]]
    changed = versions_changed(growth)
    return [*lines, f"versions changed as well: {changed}"] if changed else lines


def bars(sizes: Sequence[int]) -> str:
    """Return one bar for each size. The lowest bar stands for 0, or for a larger size if all sizes are similar."""
    if not sizes:
        return ""
    top, low = max(sizes), min(sizes)
    base = low - (top - low) if low > (top - low) else 0
    if top == low:
        return _BARS[3] * len(sizes)
    return "".join(_BARS[round((size - base) / (top - base) * (len(_BARS) - 1))] for size in sizes)


def _series(series: PeakHistory, width: int, between: Callable[[str, str], int | None]) -> list[str]:
    sizes = [point.entry.peak_bytes for point in series.points]
    room = max(8, width - 34)
    drawn = bars(sizes[-room:])
    count = f"{len(sizes)} commit{'s' * (len(sizes) > 1)}"
    lines = [shorten(f"{series.nodeid} on {series.card}", width)]
    lines.append(f"  {format_bytes(sizes[0])} {drawn} {format_bytes(sizes[-1])}, {count}")
    for growth in series.growths[-_GROWTHS:]:
        head, *rest = growth_text(growth, between)
        lines += [f"  {shorten(head, width - 2)}", *(f"    {line}" for line in rest)]
    if len(series.growths) > _GROWTHS:
        lines.append(f"  and {len(series.growths) - _GROWTHS} earlier growths; the page shows all (-o OUT.html)")
    return lines
