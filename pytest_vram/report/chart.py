"""Draw memory over time as a few lines of text."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_vram.memory import Phase, Timeline

_EIGHTHS = " ▁▂▃▄▅▆▇█"


def curve(
    timeline: Timeline, *, limit: int | None = None, width: int = 60, height: int = 5, phases: Sequence[Phase] = ()
) -> list[str]:
    """Return lines that draw allocated memory over the recorded allocations and frees, with a line at the budget.

    Args:
        timeline: the timeline to draw; an empty one gives no lines.
        limit: the budget in bytes; it is drawn if it is below the peak.
        width: columns of the drawing; the labels to the left of it take 11 more.
        height: rows of the drawing; a row for the phases and a caption follow below.
        phases: phases to name below their part of the curve, if there is room.
    """
    count, top = len(timeline.allocated), timeline.peak_bytes
    if not count or top <= 0:
        return []
    columns = []
    for column in range(width):
        first = column * count // width
        columns.append(max(timeline.allocated[first : max(first + 1, (column + 1) * count // width)]))
    levels = [round(size / top * height * 8) for size in columns]
    shown = limit is not None and 0 < limit < top
    at_limit = int((limit or 0) / top * height) if shown else -1
    rows = []
    for row in reversed(range(height)):
        line = "".join(_EIGHTHS[min(8, max(0, level - row * 8))] for level in levels)
        label = format_bytes(top) if row == height - 1 else ""
        if row == at_limit:
            line, label = line.replace(" ", "╌"), format_bytes(limit)
        rows.append(f"{label:>9} {'┼' if row == at_limit else '┤' if label else '│'}{line}".rstrip())
    named = _phases(timeline, phases, width)
    rows += [f"{'':11}{named}"] if named else []
    caption = f"peak {format_bytes(top)}" + (f", budget {format_bytes(limit)} ╌" if shown else "")
    return [*rows, f"{'':11}{caption}, over {timeline.events:,} allocations and frees"]


def _phases(timeline: Timeline, phases: Sequence[Phase], width: int) -> str:
    """Return the outermost phases as ``╰─forward─╯╰─backward─╯``; the name is left out if there is no room for it."""
    line, count = [" "] * width, len(timeline.times)
    for phase in phases:
        if phase.parent is not None:
            continue
        first = bisect.bisect_left(timeline.times, phase.start) * width // count
        last = min(width - 1, max(first, (bisect.bisect_right(timeline.times, phase.end) * width - 1) // count))
        while first < last and line[first] != " ":  # these columns belong to the phase before
            first += 1
        room = last - first - 1
        if line[first] != " " or room < 1:
            continue
        name = phase.name if len(phase.name) <= room else f"{phase.name[: room - 1]}…" if room > 3 else ""
        line[first : last + 1] = f"╰{name.center(room, '─')}╯"
    return "".join(line).rstrip()
