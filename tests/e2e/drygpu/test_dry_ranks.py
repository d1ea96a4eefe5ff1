"""Ranks of a dry run are processes that tell each other what small tensors hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def values(run_program: Callable[..., Any]) -> Ranks:
    found: Ranks = run_program("ranks.py", "values", "4", gpu="a100-80", count=4)
    assert not [answer for answer in found if "error" in answer], found
    return found


def test_small_tensors_go_through_every_collective(values: Ranks) -> None:
    for rank, answer in enumerate(values):
        assert answer["collectives"] == {
            "sum": [10, 40],
            "sum of floats": [8.0],
            "sum of halves": [8.0],
            "mean": [1.5],
            "product": [24],
            "least": [5],
            "most": [8],
            "all true": [True, False],
            "any true": [False, True],
            "broadcast": [6],
            "reduce": [26] if rank == 0 else None,
            "gather": [0, 1, 4, 9] if rank == 0 else None,
            "scatter": [7 + rank],
            "all_gather": [100, 101, 102, 103],
            "all_gather_into_tensor": [0, 0, 1, -1, 2, -2, 3, -3],
            "reduce_scatter": [4 * rank],
            "all_to_all": [rank, 10 + rank, 20 + rank, 30 + rank],
            "uneven all_to_all": [0, 1, 1, 2, 2, 2, 3, 3, 3, 3],
            "all_to_all of lists": [rank, 10 + rank, 20 + rank, 30 + rank],
        }


def test_objects_and_sent_tensors_arrive_and_large_ones_do_not(values: Ranks) -> None:
    for rank, answer in enumerate(values):
        assert answer["objects"] == {
            "all_gather": [{"rank": r, "text": "y" * (r + 1)} for r in range(4)],
            "broadcast": [{"path": "abc"}],
            "gather": [0, 1, 2, 3] if rank == 0 else None,
            "scatter": [rank * rank],
            "sent": ["hello"] if rank < 2 else None,
            "ring": (rank - 1) % 4,
            "large is unknown": 0.0,
            "nothing more held": True,
            "saved": [[".metadata"], [".metadata"]],
        }


def test_a_split_has_the_ranks_that_chose_it(run_program: Callable[..., Any]) -> None:
    """HSDP with ``device_id`` splits the whole group: 4 ranks, shards over 2."""
    for rank, answer in enumerate(run_program("ranks.py", "split", "4", gpu="a100-80", count=4)):
        assert answer["size"] == 2, answer
        assert answer["ranks"] == ([0, 1] if rank < 2 else [2, 3])
        assert answer["shard"] == 2 * 512 * 512 // 2


def test_a_hang_names_the_ranks_and_what_they_wait_in(run_program: Callable[..., Any]) -> None:
    answers = run_program("ranks.py", "hang", "2", gpu="a100-80", count=2, PYTEST_VRAM_RANKS_TIMEOUT="4")
    for answer in answers:
        assert "rank 0 waits in recv from rank 1" in answer["error"]
        assert "rank 1 waits in allreduce (the group's first collective)" in answer["error"]
        assert "(PYTEST_VRAM_RANKS_TIMEOUT sets the seconds)" in answer["error"]


def test_the_peak_of_data_parallel_training_does_not_depend_on_how_quick_the_program_is(
    run_program: Callable[..., Any],
) -> None:
    """The old buckets are held while the new ones are made, and go with the next collective: 16 MiB each.

    What a hook sends is 8 MiB a step, and a card holds all until the next step's first collective, which sends 4 MiB.
    """
    one, two = run_program("ranks.py", "ddp", "2", gpu="a100-80", count=2)
    assert "error" not in one, one
    assert one == two
    for how in ("buckets", "views", "hook", "hook in C++"):
        assert one[f"{how}, 0.0 s"] == one[f"{how}, 0.2 s"], one
    _, second, third, fourth = one["views, 0.0 s"]
    assert second >= 16  # both sets of buckets, beside what the forward pass adds
    assert third == fourth <= second
    for how in ("hook", "hook in C++"):
        assert 11.5 < one[f"{how}, 0.0 s"][3] - fourth < 12.5
    assert sum("what its communication hook sends" in note for note in one["notes"]) == 1
    assert sum("its first buckets (16.0 MiB) are held" in note for note in one["notes"]) == 1
