"""The dry GPU beside a real card: each measured case whose versions are installed here is run and compared."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import table  # noqa: E402 - its folder is put on the path above

TRUTH = table.load("h200")

# By how much a case may be off in percent: peak allocated, peak reserved. Where a line says more than EXPECTED, another
# library decides, and the run says so.
EXPECTED = (0.1, 1.0)
KNOWN = {
    "r3d18_fp32": (0.1, 5.0),  # plans of weight gradients
    "resnet50_fp32": (0.1, 3.0),  # and cuBLASLt's workspace within plans of 1x1 convolutions
}


def test_each_measured_case_has_code_and_none_is_left_out() -> None:
    registered = table.registry()
    assert set(TRUTH.cases) == set(registered)
    assert set(KNOWN) <= set(TRUTH.cases)


def test_what_was_measured_can_be_read_as_marks() -> None:
    for name, case in TRUTH.cases.items():
        assert [mark["phase"] for mark in case["marks"]], name
        for mark in case["marks"]:
            assert mark["peak_allocated"] <= mark["peak_reserved"], name


def test_beside_tells_by_how_much_the_highest_peak_is_off() -> None:
    def mark(phase: str, allocated: int, reserved: int, count: int) -> dict[str, Any]:
        return {"phase": phase, "peak_allocated": allocated, "peak_reserved": reserved, "allocations": count}

    measured = {"marks": [mark("a", 100, 200, 1), mark("b", 80, 400, 2)]}
    note = table.Note(name="cudaMallocAsync", text="a guess", source="driver")
    dry = {"marks": [mark("a", 100, 200, 1), mark("b", 110, 300, 2)], "notes": [dataclasses.asdict(note)]}
    row = table.beside("x", measured, dry)
    assert (row.allocated, row.allocated_off) == ((100, 110), pytest.approx(10))
    assert (row.reserved, row.reserved_off) == ((400, 300), pytest.approx(-25))
    assert (row.allocations, row.exact_marks, row.notes) == ((2, 2), (2, 1), (note,))
    assert row.outside == ("b peak_reserved",)
    assert table.bounds_lines(row) == [
        "reserved between 294 and 306 (4.0% apart)",
        "OUTSIDE of the bounds: b peak_reserved",
    ]
    with pytest.raises(ValueError, match="phases"):
        table.beside("x", measured, {"marks": dry["marks"][:1]})


def test_a_version_that_differs_is_named() -> None:
    assert table.differing(TRUTH, ("no-such-package",)) == ["no-such-package is not installed"]
    truth = table.Truth(card="h200", versions={"pytest": "0.1"}, cases={})
    (line,) = table.differing(truth, ("pytest",))
    assert line.startswith("pytest ")
    assert line.endswith("is installed, measured was 0.1")


@pytest.mark.parametrize("name", sorted(TRUTH.cases))
def test_a_case_needs_what_was_measured(name: str) -> None:
    case = table.registry()[name]
    if other := table.differing(TRUTH, case.packages) + table.changed(case):
        pytest.skip("; ".join(other))
    measured = TRUTH.cases[name]
    dry = table.run_dry(name, TRUTH.card, case.conf)
    row = table.beside(name, measured, dry)
    allocated, reserved = KNOWN.get(name, EXPECTED)
    assert abs(row.allocated_off) <= allocated, json.dumps(dry)
    assert abs(row.reserved_off) <= reserved, json.dumps(dry)
    assert not row.outside, json.dumps(dry)
    for moment, value in measured["context"].items():
        assert dry["context"][moment] == pytest.approx(value, rel=0.05), moment
