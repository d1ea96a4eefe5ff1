"""Streams lag behind the host by a made-up time, so that blocks which they share are reused as on a card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

EXPECTED = {
    "an_event_is_complete_when_the_host_waited_for_it": [False, False, True, True],
    "other_waits_pass_it_too": [[False, True]] * 3,
    "a_wait_for_another_stream_does_not_pass_it": [False, False, True],
    "the_host_is_slower_than_a_small_copy": True,
    "a_full_launch_queue_waits": [False, True],
    "who_polls_sees_the_end": True,
    "a_thread_that_gives_no_work_sees_everything_complete": [True, False],
    "large_work_takes_longer": [True] * 7 + [False] * 3,
    "a_shared_block_is_reused_when_the_other_stream_has_come_past_it": [3, 1, 1],
    "pinned_memory_is_reused_when_the_copy_is_done": [1, 3],
    "collectives_take_what_their_bytes_need": [[False, True]] * 4,
}


@pytest.fixture(scope="module")
def found(run_program: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return run_program("lagging.py", gpu="rtx-3090")


@pytest.mark.parametrize("name", EXPECTED)
def test_a_stream_is_as_far_as_its_work_lets_it(found: dict[str, Any], name: str) -> None:
    assert "error" not in found[name], found[name]["error"]
    assert found[name]["value"] == EXPECTED[name]
