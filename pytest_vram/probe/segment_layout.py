"""Find the allocator's segments at the peak from a replayed history."""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pytest_vram.memory import Layout, Run, Segment
from pytest_vram.probe.arena import SMALL_REQUEST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from pytest_vram.memory.layout import State
    from pytest_vram.probe.replay import Block, Replay

SEGMENTS = 400
"""The most different segments in a layout. A training step of a 7B model has about 300, most of them identical."""
RUNS = 64
"""The most runs of one segment."""


@dataclass(slots=True)
class _Range:
    """A range of addresses that the allocator got from the driver."""

    start: int
    size: int
    born: int
    small: bool | None = None
    expandable: bool = False
    private: bool = False


@dataclass(slots=True)
class _Found:
    """One segment and its used blocks, while they are collected."""

    range: _Range
    used: list[tuple[int, int, State, Block | None]] = field(default_factory=list)


def layout(
    played: Replay, before: Sequence[Mapping[str, Any]], tell: Callable[[Block], tuple[str, str | None]]
) -> Layout:
    """Return the segments at the peak.

    Args:
        played: the result of :func:`pytest_vram.probe.replay.replay`.
        before: the segments of the device before the first event.
        tell: returns the line of code and the category to show for a block.
    """
    at = played.peak
    events = played.events[:at]
    ranges = _ranges(events, before)
    starts = [one.start for one in ranges]
    found = [_Found(one) for one in ranges]

    def home(address: int) -> _Found | None:
        index = bisect.bisect_right(starts, address) - 1
        inside = index >= 0 and address < ranges[index].start + ranges[index].size
        return found[index] if inside else None

    for block in played.blocks:
        if block.born >= at or (segment := home(block.address)) is None:
            continue
        if segment.range.small is None and block.born >= segment.range.born:
            segment.range.small = block.size <= SMALL_REQUEST
        if block.alive(at):
            segment.used.append((block.address, block.size, "active", block))
        elif block.gone is None or block.gone >= at:
            segment.used.append((block.address, block.size, "pending", None))
    for address, size in _waiting(events, before).items():
        if (segment := home(address)) is not None:
            segment.used.append((address, size, "pending", None))
    return _summed([_segment(one, tell) for one in found])


def _ranges(events: Sequence[Mapping[str, Any]], before: Iterable[Mapping[str, Any]]) -> list[_Range]:
    """Return the ranges that the allocator got from the driver; parts of an expandable segment are joined."""
    held = {
        one["address"]: _Range(
            start=one["address"],
            size=one["total_size"],
            born=-1,
            small=one["segment_type"] == "small" if "segment_type" in one else None,
            expandable=bool(one.get("is_expandable")),
            private=_private(one.get("segment_pool_id")),
        )
        for one in before
    }
    for position, event in enumerate(events):
        action = event["action"]
        if action not in ("segment_alloc", "segment_map", "segment_free", "segment_unmap"):
            continue
        start, size = event["addr"], event["size"]
        if action == "segment_free":
            held.pop(start, None)
        elif action == "segment_unmap":
            _unmap(held, start, size)
        else:
            held[start] = _Range(
                start=start,
                size=size,
                born=position,
                expandable=action == "segment_map",
                private=_private(event.get("pool_id")),
            )
    joined: list[_Range] = []
    for one in sorted(held.values(), key=lambda r: r.start):
        last = joined[-1] if joined else None
        if last is not None and last.expandable and one.expandable and last.start + last.size == one.start:
            joined[-1] = replace(last, size=last.size + one.size, born=min(last.born, one.born))
        else:
            joined.append(one)
    return joined


def _unmap(held: dict[int, _Range], start: int, size: int) -> None:
    """Remove a part of expandable segments. It may span several mapped parts, or end inside of one."""
    for one in [r for r in held.values() if r.start < start + size and start < r.start + r.size]:
        del held[one.start]
        if one.start < start:
            held[one.start] = replace(one, size=start - one.start)
        if one.start + one.size > start + size:
            held[start + size] = replace(one, start=start + size, size=one.start + one.size - start - size)


def _waiting(events: Sequence[Mapping[str, Any]], before: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """Return address and size of blocks that were freed before the first event but that another stream still uses."""
    waiting = {}
    for segment in before:
        address = segment["address"]
        for block in segment["blocks"]:
            address = block.get("address", address)
            if block["state"] == "active_pending_free":
                waiting[address] = block["size"]
            address += block["size"]
    if waiting:
        for event in events:
            if event["action"] == "free_completed":
                waiting.pop(event["addr"], None)
    return waiting


def _segment(found: _Found, tell: Callable[[Block], tuple[str, str | None]]) -> Segment:
    given = found.range
    runs = list(_runs(found, tell))
    free = [run.size_bytes for run in runs if run.state == "free"]
    largest = max((size for _, size, _, _ in found.used), default=0)
    small = given.small if given.small is not None else given.size <= 2 * SMALL_REQUEST and largest <= SMALL_REQUEST
    return Segment(
        pool="small" if small else "large",
        size_bytes=given.size,
        active_bytes=sum(run.size_bytes for run in runs if run.state == "active"),
        pending_bytes=sum(run.size_bytes for run in runs if run.state == "pending"),
        largest_free_bytes=max(free, default=0),
        blocks=len(runs),
        expandable=given.expandable,
        private=given.private,
        runs=_few(runs),
    )


def _runs(found: _Found, tell: Callable[[Block], tuple[str, str | None]]) -> Iterator[Run]:
    """Yield the used blocks of a segment by address, and the free gaps between them."""
    position, end = found.range.start, found.range.start + found.range.size
    for address, size, state, block in sorted(found.used, key=lambda one: one[0]):
        if address > position:
            yield Run(state="free", size_bytes=address - position)
        line, category = (None, None) if block is None else tell(block)
        yield Run(state=state, size_bytes=size, category=category, location=line)
        position = address + size
    if position < end:
        yield Run(state="free", size_bytes=end - position)


def _few(runs: list[Run]) -> tuple[Run, ...]:
    """Return at most ``RUNS`` runs: neighbours with the same line and category are joined.

    If too many runs are left, neighbours of one category are joined as well.
    """
    joined = _joined(runs, lambda run: (run.state, run.category, run.location))
    if len(joined) > RUNS:
        joined = _joined(joined, lambda run: (run.state, run.category))
    return tuple(joined[:RUNS])


def _joined(runs: Iterable[Run], key: Callable[[Run], Any]) -> list[Run]:
    result = []
    for _, group in groupby(runs, key):
        same = list(group)
        one_line = all(run.location == same[0].location for run in same)
        result.append(
            replace(
                same[0],
                size_bytes=sum(run.size_bytes for run in same),
                count=sum(run.count for run in same),
                location=same[0].location if one_line else None,
            )
        )
    return result


def _summed(segments: list[Segment]) -> Layout:
    alike = Counter(segments)
    shown = [replace(segment, count=count) for segment, count in alike.items()]
    shown.sort(key=lambda s: (-s.size_bytes, -s.active_bytes, s.pool))
    left_out = shown[SEGMENTS:]
    return Layout(
        reserved_bytes=sum(s.size_bytes for s in segments),
        allocated_bytes=sum(s.active_bytes for s in segments),
        pending_bytes=sum(s.pending_bytes for s in segments),
        cached_bytes=sum(s.size_bytes for s in segments if not s.active_bytes and not s.pending_bytes),
        largest_free_bytes=max((s.largest_free_bytes for s in segments), default=0),
        segment_count=len(segments),
        segments=tuple(shown[:SEGMENTS]),
        more_count=sum(s.count for s in left_out),
        more_bytes=sum(s.count * s.size_bytes for s in left_out),
    )


def _private(pool: Any) -> bool:
    return pool is not None and tuple(pool) != (0, 0)
