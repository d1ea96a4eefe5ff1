"""A run takes the largest micro-batches for which the card has room, and keeps to what it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def found(run_program: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return run_program("split.py", gpu="rtx-4060")


def test_an_empty_card_takes_all_rows_of_a_step_at_once(found: dict[str, Any]) -> None:
    size, accumulation, note = found["empty"]
    assert (size, accumulation) == (12, 1)
    assert "micro-batches of 12, the largest for which there is room" in note


def test_a_full_card_takes_the_largest_that_fits_and_no_other_number_of_rows(found: dict[str, Any]) -> None:
    """There is room for five rows beside the margin, and twelve are a multiple of four."""
    assert found["full"][:2] == [4, 3]
    assert found["fits"] == {"4": True, "60": False}


def test_where_no_larger_one_fits_rows_are_taken_one_at_a_time(found: dict[str, Any]) -> None:
    assert found["prime"][:2] == [1, 7]


def test_a_split_that_is_given_stays(found: dict[str, Any]) -> None:
    assert found["given"] == [1, 12, None]


def test_where_the_split_changes_the_result_it_is_left_alone(found: dict[str, Any]) -> None:
    size, accumulation, note = found["dropout"]
    assert (size, accumulation) == (1, 12)
    assert "dropout" in note


def test_trials_leave_nothing_behind(found: dict[str, Any]) -> None:
    assert (found["left"], found["gradients"]) == (0, False)
