"""A run takes the micro-batches and the recomputed layers for which the card has room, and keeps to what it is told."""

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
    size, accumulation, recomputed, note = found["empty"]
    assert (size, accumulation, recomputed) == (12, 1, "none")
    assert "micro-batches of 12, and no layer recomputes anything: estimated to be the fastest" in note


def test_a_full_card_takes_the_largest_that_fits_and_no_other_number_of_rows(found: dict[str, Any]) -> None:
    """There is room for five rows that recompute all beside the margin, and twelve are a multiple of four."""
    assert found["full"][:3] == [4, 3, "all"]
    assert found["fits"] == {"4": True, "60": False}


def test_where_no_larger_one_fits_rows_are_taken_one_at_a_time(found: dict[str, Any]) -> None:
    assert found["prime"][:2] == [1, 7]


def test_a_family_that_the_arithmetic_does_not_know_is_chosen_by_trials(found: dict[str, Any]) -> None:
    assert found["unknown"][:3] == [12, 1, "none"]


def test_a_given_micro_batch_stays_and_layers_keep_what_there_is_room_for(found: dict[str, Any]) -> None:
    size, accumulation, recomputed, note = found["given"]
    assert (size, accumulation, recomputed) == (1, 12, "none")
    assert "micro-batches" not in note
    assert found["given and full"][2] == 1  # of two; see split.py for the room


def test_what_a_trial_left_free_is_not_measured_again(found: dict[str, Any]) -> None:
    assert "stay on the card" in found["gradients, tried"]
    assert found["gradients, untried"] == found["gradients, tried"]
    assert "wait in host memory" in found["gradients, tried and full"]


def test_a_trial_does_not_count_what_was_held_before_it(found: dict[str, Any]) -> None:
    first, again = found["spare"]
    assert first == again > 0


def test_what_is_given_is_not_chosen(found: dict[str, Any]) -> None:
    assert found["all given"] == [1, 12, 1, None]


def test_inputs_go_to_the_host_where_layers_recompute_and_nothing_else_fits(found: dict[str, Any]) -> None:
    size, recomputed, offload, note = found["tight"]
    assert (recomputed, offload) == ("all", True)
    assert "the inputs of the layers that recompute wait in host memory (--offload-activations)" in note
    size, recomputed, offload, note = found["none"]
    assert (size, recomputed, offload) == (1, "all", True)
    assert "there is room for nothing larger" in note


def test_where_the_split_changes_the_result_it_is_left_alone(found: dict[str, Any]) -> None:
    size, accumulation, recomputed, note = found["dropout"]
    assert (size, accumulation, recomputed) == (1, 12, "none")
    assert "dropout" in note


def test_trials_leave_nothing_behind(found: dict[str, Any]) -> None:
    assert (found["left"], found["gradients"]) == (0, False)


def test_a_trial_holds_no_memory_to_keep_it_free(found: dict[str, Any]) -> None:
    """The room that is left beside a step counted in the peak of a run's process."""
    assert found["beside the step"] < found["margin"] / 2


def test_a_trial_gets_no_more_than_its_share_of_the_card(found: dict[str, Any]) -> None:
    assert found["capped"] == [False, True], "within the trial, and after it"


def test_the_share_of_the_card_that_a_user_allows_stays(found: dict[str, Any]) -> None:
    assert found["fraction"] == pytest.approx(0.9)


def test_earlier_gradients_go_to_the_host_only_where_the_card_has_no_room(found: dict[str, Any]) -> None:
    (empty, none), (full, all_of_them) = found["gradients, empty"], found["gradients, full"]
    assert "stay on the card" in empty
    assert "wait in host memory" in full
    assert none < 2**16 < all_of_them
    assert found["gradients, ordinary optimizer"][0] is None
