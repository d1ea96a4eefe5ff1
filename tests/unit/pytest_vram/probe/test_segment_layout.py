"""Segments at the peak, out of a history."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pytest_vram.memory import Layout
from pytest_vram.memory.codec import decode
from pytest_vram.probe import segment_layout as layouts
from pytest_vram.probe.program_events import Marks
from pytest_vram.probe.replay import replay
from pytest_vram.probe.segment_layout import layout

MB = 2**20


def at_peak(*events: tuple[Any, ...], before: Any = ()) -> Layout:
    full: list[dict[str, Any]] = []
    for action, addr, size, *line in events:
        frames = [{"filename": "/home/me/train.py", "line": line[0], "name": "step"}] if line else []
        full.append({"action": action, "addr": addr, "size": size, "time_us": len(full), "frames": frames})
    played = replay(full, before, Marks(), 0)
    found = layout(played, before, lambda block: (f"line {block.frames[0]['line']}" if block.frames else "", "other"))
    assert decode(Layout, asdict(found)) == found
    return found


def test_what_is_free_and_what_waits_is_told_apart() -> None:
    found = at_peak(
        ("segment_alloc", 0, 20 * MB),
        ("alloc", 0, 4 * MB, 1),
        ("alloc", 4 * MB, 4 * MB, 2),
        ("alloc", 8 * MB, 4 * MB, 3),
        ("free_requested", 4 * MB, 4 * MB),
        ("segment_alloc", 100 * MB, 2 * MB),
        ("segment_alloc", 200 * MB, 50 * MB),
        ("alloc", 200 * MB, 50 * MB, 4),
        ("free_completed", 4 * MB, 4 * MB),
    )
    assert [(s.pool, s.size_bytes // MB, s.active_bytes // MB) for s in found.segments] == [
        ("large", 50, 50),
        ("large", 20, 8),
        ("small", 2, 0),
    ]
    split = found.segments[1]
    assert [(r.state, r.size_bytes // MB, r.location) for r in split.runs] == [
        ("active", 4, "line 1"),
        ("pending", 4, None),
        ("active", 4, "line 3"),
        ("free", 8, None),
    ]
    assert (split.pending_bytes, split.free_bytes, split.largest_free_bytes) == (4 * MB, 8 * MB, 8 * MB)
    assert (found.reserved_bytes, found.allocated_bytes, found.pending_bytes) == (72 * MB, 58 * MB, 4 * MB)
    assert (found.cached_bytes, found.fragmented_bytes, found.largest_free_bytes) == (2 * MB, 8 * MB, 8 * MB)


def test_segments_that_went_back_before_the_peak_are_not_there() -> None:
    found = at_peak(
        ("segment_alloc", 0, 20 * MB),
        ("segment_free", 0, 20 * MB),
        ("segment_map", 100 * MB, 20 * MB),
        ("segment_map", 120 * MB, 20 * MB),
        ("segment_unmap", 110 * MB, 4 * MB),
        ("alloc", 120 * MB, 20 * MB, 1),
    )
    assert [(s.size_bytes // MB, s.active_bytes // MB, s.expandable) for s in found.segments] == [
        (26, 20, True),
        (10, 0, True),
    ]


def test_a_pool_is_small_by_what_is_asked_of_it() -> None:
    found = at_peak(
        ("segment_map", 0, 4 * MB), ("alloc", 0, 512, 1), ("segment_map", 50 * MB, 2 * MB), ("alloc", 50 * MB, 2 * MB)
    )
    assert [(s.pool, s.size_bytes // MB) for s in found.segments] == [("small", 4), ("large", 2)]


def test_what_was_there_before_counts_with_what_waited_then() -> None:
    before = {
        "address": 100 * MB,
        "total_size": 20 * MB,
        "segment_type": "large",
        "segment_pool_id": (0, 3),
        "blocks": [
            {"size": 4 * MB, "state": "active_allocated"},
            {"size": 2 * MB, "state": "active_pending_free"},
            {"size": 14 * MB, "state": "inactive"},
        ],
    }
    (segment,) = at_peak(before=[before]).segments
    assert segment.private
    assert [(r.state, r.size_bytes // MB) for r in segment.runs] == [("active", 4), ("pending", 2), ("free", 14)]


def test_like_segments_and_like_neighbours_are_one(monkeypatch: Any) -> None:
    events: list[tuple[Any, ...]] = []
    for start in range(0, 30 * MB, 10 * MB):
        events.append(("segment_alloc", start, 2 * MB))
        events += [("alloc", start + i * 1024, 1024, i // 8) for i in range(32)]
    (segment,) = at_peak(*events).segments
    assert (segment.count, segment.blocks) == (3, 33)
    assert [(r.state, r.count, r.location) for r in segment.runs] == [
        *(("active", 8, f"line {i}") for i in range(4)),
        ("free", 1, None),
    ]
    monkeypatch.setattr(layouts, "RUNS", 3)
    assert [(r.state, r.count, r.location) for r in at_peak(*events).segments[0].runs] == [
        ("active", 32, None),
        ("free", 1, None),
    ]


def test_what_is_left_out_is_counted(monkeypatch: Any) -> None:
    monkeypatch.setattr(layouts, "SEGMENTS", 2)
    segments = [("segment_alloc", i * 100 * MB, size * MB) for i, size in enumerate((2, 20, 40, 2))]
    found = at_peak(*segments, ("alloc", 0, 512))
    assert [s.size_bytes // MB for s in found.segments] == [40, 20]
    assert (found.segment_count, found.more_count, found.more_bytes // MB) == (4, 2, 4)
