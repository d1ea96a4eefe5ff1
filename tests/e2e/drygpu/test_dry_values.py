"""Values of small tensors are the program's own; what the device would have computed is listed, and labelled."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

SOURCE = Path(__file__).parent / "programs" / "values.py"


def _check_names() -> list[str]:
    for node in ast.parse(SOURCE.read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):
            return [ast.literal_eval(key) for key in node.value.keys if key is not None]
    raise AssertionError("CHECKS is gone")


@pytest.fixture(scope="module", params=["get_kernel", "BackendSelect"])
def values(run_program: Callable[..., dict[str, Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
    """The two ways in which kernels are put in front of torch's: torch 2.9 and later, and 2.6 to 2.8."""
    return run_program("values.py") if request.param == "get_kernel" else run_program("older_torch.py", "values.py")


@pytest.mark.parametrize("name", _check_names())
def test_known_values_are_those_of_the_cpu(values: dict[str, Any], name: str) -> None:
    assert values["differ"][name] is None


def test_random_chains_of_operators_agree_with_the_cpu(values: dict[str, Any]) -> None:
    assert values["random"] == []


def test_every_read_of_known_values_is_answered(values: dict[str, Any]) -> None:
    assert values["reads"] == []


def test_nothing_is_kept_alive_on_the_device(values: dict[str, Any]) -> None:
    assert values["held"] == 0


def test_a_new_tensor_does_not_inherit_the_values_of_its_address(values: dict[str, Any]) -> None:
    assert values["unknown"]["same address"]
    assert values["unknown"]["stale"] == [0, 0, 0, 0]


def test_unknown_values_take_the_ordinary_path(values: dict[str, Any]) -> None:
    unknown = values["unknown"]
    assert unknown["loss"] == 0.0
    assert unknown["finite"] is True
    assert unknown["nan"] is False


def test_routing_is_balanced(values: dict[str, Any]) -> None:
    """Twelve choices among eight experts: none has two more than another."""
    assert max(values["unknown"]["router"]) - min(values["unknown"]["router"]) <= 1
    assert sum(values["unknown"]["router"]) == 12


def test_sampled_tokens_are_among_the_words(values: dict[str, Any]) -> None:
    for token in (values["unknown"]["sampled"], *values["unknown"]["greedy"]):
        assert 0 <= token < 8


def test_what_a_distribution_or_a_solver_checks_passes(values: dict[str, Any]) -> None:
    assert values["unknown"]["drawn"] == [64, 64]
    assert values["unknown"]["error code"] == 0


@pytest.mark.parametrize("name", ["erfinv_", "out", "a list", "an optimizer"])
def test_what_a_kernel_writes_over_is_no_longer_known(values: dict[str, Any], name: str) -> None:
    assert values["unknown"][f"after {name}"]


def test_an_unknown_mask_takes_the_largest_size(values: dict[str, Any]) -> None:
    assert values["unknown"]["mask"] == [48, 2]
    assert values["unknown"]["columns"] == [6, 8]


def test_distinct_unknown_values_have_counts_that_agree_with_their_number(values: dict[str, Any]) -> None:
    """torch's exponential of several matrices splits them by such counts, which it joins with unknown ones."""
    assert values["unknown"]["counts"] == [48, 8]
    assert values["unknown"]["inverse"] == [0, 1, 2, 3, 4, 5]
    assert values["unknown"]["joined"] == [3, 4]
    assert values["unknown"]["exponentials"] == [16, 8, 8]


def test_questions_about_one_unknown_mask_get_answers_that_agree(values: dict[str, Any]) -> None:
    assert values["unknown"]["counted"] == [48, [8] * 6, 48, 0]


def test_random_numbers_have_their_distribution_and_are_drawn_again(values: dict[str, Any]) -> None:
    drawn = values["unknown"]["drawn again"]
    assert drawn["same"]
    assert drawn["another"]
    assert drawn["classes"] == 10
    assert 70 < drawn["kept"] < 100
    counted, selected = drawn["mask"]
    assert 4500 < counted == selected < 5100


@pytest.mark.parametrize(
    ("operation", "answered", "note"),
    [
        ("item", False, "computed on the device: read as zero"),
        ("copy to host", False, "computed on the device: read as zero"),
        ("item", True, "values taken as finite"),
        ("copy to host", True, "indices taken as spread evenly (a router's experts, sampled tokens)"),
        ("item", True, "indices taken as spread evenly (a router's experts, sampled tokens)"),
        ("nonzero", True, "unknown mask taken as all true"),
        ("normal", True, "a check of values taken as passed"),
        ("item", True, "a check of values taken as passed"),
        ("item", True, "unknown mask taken as all true"),
        ("copy to host", True, "random numbers taken as drawn on the CPU, from the same distribution"),
        ("item", True, "a solver's error code taken as 0, no error"),
    ],
)
def test_reads_are_listed_with_their_line_and_label(
    values: dict[str, Any], operation: str, answered: bool, note: str
) -> None:
    assert [operation, answered, note, "values.py"] in values["unknown"]["reads"]
