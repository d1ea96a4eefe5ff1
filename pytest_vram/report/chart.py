"""Memory over time in a few lines of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from pytest_vram.memory import Timeline

_EIGHTHS = " ▁▂▃▄▅▆▇█"


def curve(timeline: Timeline, *, limit: int | None = None, width: int = 60, height: int = 4) -> list[str]:
    """Draw allocated memory over the test's allocations, from left to right, with a line at the budget.

    Args:
        timeline: what to draw; nothing comes back for an empty one.
        limit: the budget in bytes; drawn where it lies below the peak.
        width: columns.
        height: rows of the drawing; a caption comes below it.
    """
    count, top = len(timeline.allocated), timeline.peak_bytes
    if not count or top <= 0:
        return []
    columns = []
    for column in range(width):
        first = column * count // width
        columns.append(max(timeline.allocated[first : max(first + 1, (column + 1) * count // width)]))
    levels = [round(size / top * height * 8) for size in columns]
    rows = []
    for row in reversed(range(height)):
        line = "".join(_EIGHTHS[min(8, max(0, level - row * 8))] for level in levels)
        if limit is not None and 0 < limit < top and int(limit / top * height) == row:
            line = line.replace(" ", "╌")
        rows.append(line.rstrip())
    caption = f"peak {format_bytes(top)}"
    if limit is not None and 0 < limit < top:
        caption += f", budget {format_bytes(limit)} ╌"
    return [*rows, f"{caption}, over {timeline.events:,} allocations and frees"]
