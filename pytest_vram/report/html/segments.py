"""Prepare the allocator's segments for the page: rows of a table, and compact data for a drawing."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_vram.memory import Layout, Segment

ROWS = 20
STATES = ("active", "pending", "free")


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRow:
    """All segments of one pool and size, summed."""

    pool: str
    size_bytes: int
    count: int
    active_bytes: int
    pending_bytes: int
    free_bytes: int
    largest_free_bytes: int
    location: str | None
    """The line of code that holds the most of their bytes."""


def segment_rows(layout: Layout) -> tuple[list[SegmentRow], int, int]:
    """Return the rows, largest first, and the number and bytes of the segments that they leave out."""
    groups: dict[tuple[str, int], list[Segment]] = {}
    for segment in layout.segments:
        groups.setdefault((_pool(segment), segment.size_bytes), []).append(segment)
    found = sorted(
        (_row(*key, alike) for key, alike in groups.items()), key=lambda r: (-r.size_bytes * r.count, r.pool)
    )
    rest = found[ROWS:]
    return (
        found[:ROWS],
        layout.more_count + sum(row.count for row in rest),
        layout.more_bytes + sum(row.count * row.size_bytes for row in rest),
    )


def _row(pool: str, size: int, segments: list[Segment]) -> SegmentRow:
    lines: dict[str, int] = {}
    for segment in segments:
        for run in segment.runs:
            if run.location:
                lines[run.location] = lines.get(run.location, 0) + run.size_bytes * segment.count
    return SegmentRow(
        pool=pool,
        size_bytes=size,
        count=sum(s.count for s in segments),
        active_bytes=sum(s.active_bytes * s.count for s in segments),
        pending_bytes=sum(s.pending_bytes * s.count for s in segments),
        free_bytes=sum(s.free_bytes * s.count for s in segments),
        largest_free_bytes=max(s.largest_free_bytes for s in segments),
        location=max(lines, key=lines.__getitem__, default=None),
    )


def _pool(segment: Segment) -> str:
    return segment.pool + (", private" if segment.private else "") + (", expandable" if segment.expandable else "")


def layout_data(layout: Layout, number: Callable[[str | None], int], *, full: bool) -> dict[str, Any]:
    """Return the data for the script: the sums and, if ``full``, the table and every run of every segment.

    Args:
        layout: the segments.
        number: returns the number of a text.
        full: whether to include more than the sums.
    """
    sums = (
        layout.reserved_bytes,
        layout.allocated_bytes,
        layout.pending_bytes,
        layout.cached_bytes,
        layout.fragmented_bytes,
        layout.largest_free_bytes,
        layout.segment_count,
    )
    data: dict[str, Any] = {"sums": sums}
    if full:
        rows, more_count, more_bytes = segment_rows(layout)
        data["rows"] = [[*astuple(row)[:-1], number(row.location)] for row in rows]
        data["more"] = [more_count, more_bytes]
        data["undrawn"] = [layout.more_count, layout.more_bytes]
        data["segments"] = [
            [
                int(segment.pool == "small"),
                segment.count,
                segment.size_bytes,
                segment.blocks,
                [
                    [STATES.index(run.state), run.size_bytes, run.count, number(run.category), number(run.location)]
                    if run.state == "active"
                    else [STATES.index(run.state), run.size_bytes]
                    for run in segment.runs
                ],
            ]
            for segment in layout.segments
        ]
    return data
