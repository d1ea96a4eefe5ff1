"""The allocator's rule for splitting blocks, from recorded addresses alone."""

from __future__ import annotations

from typing import Any

from pytest_vram.probe.arena import Arena

MB = 2**20


def event(action: str, addr: int, size: int) -> dict[str, Any]:
    return {"action": action, "addr": addr, "size": size}


def arena(*events: dict[str, Any]) -> Arena:
    made = Arena()
    for one in events:
        made.see(one)
    return made


def test_a_small_request_takes_what_it_needs() -> None:
    made = arena(event("segment_alloc", 0, 2 * MB))
    assert made.see(event("alloc", 0, 1)) == 512
    assert made.see(event("alloc", 512, 513)) == 1024


def test_a_rest_of_a_megabyte_stays_with_its_block() -> None:
    assert arena(event("segment_alloc", 0, 20 * MB)).see(event("alloc", 0, 19 * MB)) == 20 * MB
    assert arena(event("segment_alloc", 0, 20 * MB)).see(event("alloc", 0, 19 * MB - 1)) == 20 * MB
    assert arena(event("segment_alloc", 0, 20 * MB)).see(event("alloc", 0, 19 * MB - 512)) == 19 * MB - 512


def test_expandable_segments_split_down_to_a_block() -> None:
    made = arena(event("segment_map", 0, 20 * MB))
    assert made.see(event("alloc", 0, 19 * MB)) == 19 * MB
    assert made.see(event("alloc", 19 * MB, MB - 512)) == MB - 512


def test_free_neighbours_become_one_block_within_a_segment() -> None:
    made = arena(
        event("segment_alloc", 0, 20 * MB),
        event("segment_alloc", 20 * MB, 20 * MB),
        event("alloc", 0, 8 * MB),
        event("alloc", 8 * MB, 6 * MB),
        event("alloc", 20 * MB, 5 * MB),
        event("free_completed", 0, 8 * MB),
        event("free_completed", 8 * MB, 6 * MB),
    )
    assert made.see(event("alloc", 0, 20 * MB)) == 20 * MB  # not into the next segment, which is free from 25 MB on


def test_memory_is_there_again_only_when_the_free_is_complete() -> None:
    made = arena(event("segment_alloc", 0, 2 * MB), event("alloc", 0, 2 * MB), event("free_requested", 0, 2 * MB))
    assert 0 not in made._free
    made.see(event("free_completed", 0, 2 * MB))
    assert made._free[0][0] == 2 * MB


def test_a_part_of_an_expandable_segment_can_go() -> None:
    made = arena(event("segment_map", 0, 8 * MB), event("segment_unmap", 2 * MB, 4 * MB))
    assert {address: size for address, (size, _) in made._free.items()} == {0: 2 * MB, 6 * MB: 2 * MB}


def test_a_snapshot_says_what_was_there() -> None:
    segment = {
        "address": 100 * MB,
        "total_size": 20 * MB,
        "blocks": [
            {"size": 4 * MB, "state": "active_allocated"},
            {"size": 2 * MB, "state": "active_pending_free"},
            {"size": 14 * MB, "state": "inactive"},
        ],
    }
    made = Arena()
    assert made.take_segment(segment) == {100 * MB: 4 * MB}
    assert made.see(event("alloc", 106 * MB, 13 * MB)) == 14 * MB


def rounded(asked: int, **divisions: int) -> int:
    """What the allocator's setting makes of a request; divisions by size in MiB."""
    settings = {"roundup_power2_divisions": {str(1 << i): divisions.get(f"mb{1 << i}", 0) for i in range(16)}}
    return Arena(settings).see(event("alloc", 0, asked))


def test_requests_are_rounded_to_parts_of_a_power_of_two_where_the_setting_says_so() -> None:
    assert rounded(1200 * 1024, mb1=4) == 1280 * 1024  # between 1 and 2 MiB in steps of 256 KiB
    assert rounded(MB, mb1=4) == MB
    assert rounded(1200, mb1=4) == 1536  # too small for parts of whole blocks
    assert rounded(5 * MB + 1, mb1=4) == 5 * MB + 512  # of sizes from 4 MiB on nothing is said
    assert rounded(5 * MB + 1, mb4=2) == 6 * MB
    assert rounded(100 * 2**30, mb32768=8) == 104 * 2**30


def test_a_block_of_the_largest_size_to_split_is_given_whole() -> None:
    made = Arena({"max_split_size": 20 * MB})
    made.see(event("segment_alloc", 0, 40 * MB))
    assert made.see(event("alloc", 0, 20 * MB)) == 40 * MB
    made = Arena({"max_split_size": 20 * MB})
    made.see(event("segment_alloc", 0, 40 * MB))
    assert made.see(event("alloc", 0, 19 * MB)) == 19 * MB
