from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vram.memory import (
    Budget,
    Device,
    Environment,
    Exceeded,
    Measurement,
    Peak,
    Report,
    TestRecord,
    Within,
    Work,
)
from pytest_vram.report.terminal import bar, display_width, render, shorten
from pytest_vram.units import GIB, MIB

CARD = Device(kind="cuda", index=0, name="a card")
WIDE = "tests/試験/test_幅.py::TestÉtat::test_名前の長い試験[パラメータ-🙂-e\u0301]"


def record(nodeid: str, size: int, limit: int | None = None) -> TestRecord:
    verdict = None
    if limit is not None:
        verdict = Within(headroom_bytes=limit - size) if size <= limit else Exceeded(over_bytes=size - limit)
    return TestRecord(
        nodeid=nodeid,
        outcome="failed" if isinstance(verdict, Exceeded) else "passed",
        budget=None if limit is None else Budget(limit_bytes=limit),
        measurements=(Measurement(device=CARD, peak=Peak(allocated_bytes=size)),),
        verdict=verdict,
    )


def report(*tests: TestRecord) -> Report:
    return Report(environment=Environment(python="3.11", pytest_vram="0.1.0", devices=(CARD,)), tests=tests)


@pytest.mark.parametrize("width", [60, 72, 76, 80, 100, 143, 200])
def test_no_row_is_wider_than_the_terminal(width: int) -> None:
    text = render(report(record(WIDE * 3, GIB, 2 * GIB), record("test_short.py::t", 3 * GIB, GIB)), width=width)
    assert max(display_width(line) for line in text.splitlines()) <= width
    assert "1.00 GiB" in text


def test_broken_budgets_come_first_then_the_largest() -> None:
    text = render(report(record("small", MIB), record("large", GIB), record("broken", 2 * MIB, MIB)), width=80)
    assert re.findall(r"small|large|broken", text) == ["broken", "large", "small"]


def test_quiet_shows_the_ten_worst_and_says_how_many_more() -> None:
    text = render(report(*(record(f"t{i}", i * MIB + 1) for i in range(13))), verbosity=-1)
    assert "t12" in text
    assert not re.search(r"\bt2\b", text)
    assert text.splitlines()[-1] == "and 3 more"


def test_colour_only_where_asked_for() -> None:
    broken = report(record("t", 2, 1))
    assert "\x1b[31m" in render(broken, color=True)
    assert "\x1b" not in render(broken, color=False)


def test_a_budget_broken_a_thousandfold_keeps_its_column() -> None:
    assert ">999%" in render(report(record("t", 10_000 * MIB, MIB)))


@given(st.text(max_size=60), st.integers(0, 70))
def test_shortened_text_fits_and_short_text_stays(text: str, width: int) -> None:
    short = shorten(text, width)
    assert display_width(short) <= max(width, 0) or width < 3
    if display_width(text) <= width:
        assert short == text


@given(st.one_of(st.none(), st.floats(-1, 5)))
def test_a_bar_is_ten_columns(used: float | None) -> None:
    assert len(bar(used)) == 10


def test_a_bar_is_full_at_the_limit_and_half_at_half_of_it() -> None:
    assert bar(1.0) == "█" * 10
    assert bar(0.5) == "█" * 5 + " " * 5
    assert bar(0.0) == " " * 10


def test_the_work_of_a_whole_test_is_shown_beside_its_phases() -> None:
    test = record("t", MIB)
    (measured,) = test.measurements
    test = replace(test, measurements=(replace(measured, work=Work(launches=1204, synchronizations=2)),))
    line = f"{'':>10}   asked of the device: 1,204 kernels, 2 waits"
    assert line in render(report(test), width=80, verbosity=1).splitlines()
    assert "kernels" not in render(report(test), width=80)
    assert "kernels" not in render(report(record("t", MIB)), width=80, verbosity=1)
