"""Sparse tensors: torch's own code runs on stand-ins for cuSPARSE and cuSPARSELt, and says what is not known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module")
def sparse(run_program: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What programs/sparse.py found."""
    return run_program("sparse.py", gpu="h200")


def test_every_layout_runs_and_no_function_is_missing(sparse: dict[str, Any]) -> None:
    assert sparse["failed"] == {}
    assert sparse["missing"] == []
    assert "cuSPARSE: its workspaces are not known and counted as 0 bytes" in sparse["notes"]


def test_elements_with_the_same_indices_are_counted_where_they_are_known(sparse: dict[str, Any]) -> None:
    counts = sparse["counts"]
    assert counts["coalesced"] == 3
    assert counts["indices"] == [[0, 1, 5], [2, 0, 3]]
    assert counts["rows"] == [0, 1, 2, 2, 2, 2, 3]


def test_unknown_indices_are_taken_as_distinct_and_told(sparse: dict[str, Any]) -> None:
    assert sparse["counts"]["coalesced, of unknown indices"] == 7
    assert ["coalesce", "unknown values taken as all distinct"] in sparse["reads"]


def test_results_of_sparse_matrices_have_as_many_elements_as_they_can_have(sparse: dict[str, Any]) -> None:
    counts = sparse["counts"]
    assert counts["product"] == 3  # three elements of the left, each with at most one of a row of the right
    assert counts["sum"] == 6
    assert any(note.startswith("cuSPARSE results: ") for note in sparse["notes"])
