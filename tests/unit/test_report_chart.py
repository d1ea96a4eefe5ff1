from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pytest_vram.memory import Timeline
from pytest_vram.report.chart import curve
from pytest_vram.units import MIB


def timeline(*sizes: int) -> Timeline:
    peak = max(range(len(sizes)), key=sizes.__getitem__, default=0)
    return Timeline(times=tuple(map(float, range(len(sizes)))), allocated=sizes, peak_index=peak, events=9)


def test_a_curve_rises_and_falls_with_the_memory() -> None:
    assert curve(timeline(0, MIB, 2 * MIB, MIB), width=4, height=2) == [
        "  █",
        " ███",
        "peak 2.00 MiB, over 9 allocations and frees",
    ]


def test_the_budget_is_a_line_where_it_lies() -> None:
    drawn = curve(timeline(0, 4 * MIB, MIB), limit=2 * MIB, width=6, height=4)
    assert drawn[1] == "╌╌██╌╌"
    assert "budget 2.00 MiB ╌" in drawn[-1]


def test_a_budget_above_the_peak_is_not_drawn() -> None:
    assert "╌" not in "".join(curve(timeline(0, MIB), limit=2 * MIB))


def test_nothing_held_is_nothing_drawn() -> None:
    assert curve(timeline()) == []
    assert curve(timeline(0, 0)) == []


@given(
    st.lists(st.integers(0, 2**40), min_size=1, max_size=300), st.none() | st.integers(0, 2**41), st.integers(10, 90)
)
def test_a_curve_keeps_its_width_and_shows_the_peak(sizes: list[int], limit: int | None, width: int) -> None:
    drawn = curve(timeline(*sizes), limit=limit, width=width, height=4)
    assert len(drawn) == (5 if max(sizes) else 0)
    assert all(len(line) <= width for line in drawn[:-1])
    assert not drawn or "█" in drawn[0]
