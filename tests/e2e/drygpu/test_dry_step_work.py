"""Budgets of finetune's own step in kernels, copies and waits, held on a machine without a card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

pytest.importorskip("bitsandbytes")
LAYERS = 4
ADAPTED = LAYERS * 2 * 7  # matrices: A and B of seven linear layers
INPUT = 2 * 256 * 512 * 2  # bytes of a layer's input: two rows of 256 tokens, in bf16


@pytest.fixture(scope="module")
def work(run_program: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return run_program("step_work.py", gpu="h200")


@pytest.mark.parametrize("name", ["one", "four"])
def test_a_step_waits_for_its_two_figures_and_for_nothing_else(work: dict[str, Any], name: str) -> None:
    """The loss and the gradient's norm, however many micro-batches there are."""
    assert [step["synchronizations"] for step in work[name][:3]] == [2, 2, 2]


def test_the_optimizer_is_one_kernel_and_a_table_of_addresses(work: dict[str, Any]) -> None:
    update = work["one"][3]
    assert update["launches"] == 1
    assert update["copied_to_device_bytes"] == 7 * 8 * ADAPTED
    assert update["copies_to_host"] == update["synchronizations"] == update["copies_on_device"] == 0


def test_gradients_wait_on_the_host_in_few_copies(work: dict[str, Any]) -> None:
    one, four = work["one"][2], work["on card"][2]
    moved = four["copies_to_host"] - one["copies_to_host"] + four["copies_to_device"] - one["copies_to_device"]
    assert moved <= 2 * 3 + 4 * 3  # a chunk there and back for each of three micro-batches, and their four inputs
    assert four["synchronizations"] == one["synchronizations"]


def test_inputs_cross_the_bus_once_each_way_in_one_copy_each_and_nothing_waits(work: dict[str, Any]) -> None:
    """All but that of the last layer, in each of four micro-batches, from and to memory that is pinned once."""
    there, here = work["four"][2], work["on card"][2]
    moved = 4 * (LAYERS - 1)
    for way in ("to_host", "to_device"):
        assert there[f"copies_{way}"] - here[f"copies_{way}"] == moved
        assert there[f"copied_{way}_bytes"] - here[f"copied_{way}_bytes"] == moved * INPUT
    assert there["synchronizations"] == here["synchronizations"]
    assert there["launches"] == here["launches"]
    assert work["pinned"] == (LAYERS - 1) * INPUT


def test_the_control_launches_more_and_comes_to_the_same_copies(work: dict[str, Any]) -> None:
    assert work["torch"][3]["launches"] > 10 * ADAPTED
    assert work["torch"][3]["synchronizations"] == 0
    assert work["one"][2]["launches"] < 0.8 * work["torch"][2]["launches"]
