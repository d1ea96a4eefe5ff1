"""The page on versions has rows that were run, of versions that pyproject.toml declares."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import matrix

ROWS = [
    line
    for line in (matrix.ROOT / "docs" / "reference" / "versions.md").read_text().splitlines()
    if line.startswith(tuple(f"| {name} |" for name in matrix.ROWS))
]


def test_the_page_has_rows_that_were_run_and_did_not_fail() -> None:
    assert ROWS
    assert [row for row in ROWS if "failed" in row or "cannot be installed" in row or "not run" in row] == []


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_of_versions_that_are_declared(row: str) -> None:
    name, _, versions = (cell.strip() for cell in row.split("|")[1:4])
    found = dict(pair.split(" ") for pair in versions.split(", "))
    if name.startswith("torch-"):
        assert found["torch"].startswith(f"{name.removeprefix('torch-')}.")
    for package in {"torch", "transformers", "peft", "bitsandbytes"} & set(found):
        assert matrix.numbers(found[package]) >= matrix.numbers(matrix.declared()[package])
        assert name != "lowest" or matrix.is_floor(matrix.declared()[package], found[package])


def test_the_floor_of_a_package_is_the_highest_that_is_asked_for() -> None:
    assert matrix.declared()["pytest"] == "9.0"  # the plugin alone asks for 8.4
    assert "uv" not in matrix.declared()  # what development needs is not what users get


@pytest.mark.parametrize(
    ("floor", "version", "same"),
    [("2.6", "2.6.0+cu124", True), ("4.66", "4.66.3", True), ("0.5", "0.8.0", False), ("6", "6.0", True)],
)
def test_a_floor_is_met_by_its_own_release_alone(floor: str, version: str, same: bool) -> None:
    assert matrix.is_floor(floor, version) == same
