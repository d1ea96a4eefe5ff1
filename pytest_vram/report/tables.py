"""Convert the recording of one test to tables: over time, by holder, and by segment."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pytest_vram.memory.timeline import CATEGORIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_vram.memory import Measurement

Line = dict[str, Any]


def timeline_lines(measurement: Measurement) -> Iterator[Line]:
    """Yield a line for each moment: seconds, allocated and reserved bytes, and the bytes of each category."""
    timeline = measurement.timeline
    if timeline is None:
        return
    parts = {series.name: series.sizes for series in timeline.categories}
    for i, seconds in enumerate(timeline.times):
        yield {
            "seconds": seconds,
            "allocated_bytes": timeline.allocated[i],
            "reserved_bytes": timeline.reserved[i] if timeline.reserved else None,
            "peak": i == timeline.peak_index,
            **{f"{name}_bytes": parts[name][i] for name in CATEGORIES if name in parts},
        }


def holder_lines(measurement: Measurement) -> Iterator[Line]:
    """Yield a line for each holder of the peak."""
    for holder in measurement.holders:
        yield asdict(holder)


def segment_lines(measurement: Measurement) -> Iterator[Line]:
    """Yield a line for each group of identical segments, with the line of code that holds most of it."""
    layout = measurement.timeline.layout if measurement.timeline else None
    for segment in layout.segments if layout else ():
        used: dict[str, int] = {}
        for run in segment.runs:
            if run.state == "active" and run.location:
                used[run.location] = used.get(run.location, 0) + run.size_bytes
        yield {
            "pool": segment.pool,
            "count": segment.count,
            "size_bytes": segment.size_bytes,
            "active_bytes": segment.active_bytes,
            "pending_bytes": segment.pending_bytes,
            "free_bytes": segment.free_bytes,
            "largest_free_bytes": segment.largest_free_bytes,
            "blocks": segment.blocks,
            "expandable": segment.expandable,
            "private": segment.private,
            "location": max(used, key=used.__getitem__, default=None),
        }


TABLES: dict[str, Callable[[Measurement], Iterator[Line]]] = {
    "timeline": timeline_lines,
    "holders": holder_lines,
    "segments": segment_lines,
}
