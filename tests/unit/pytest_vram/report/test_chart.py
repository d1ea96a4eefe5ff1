from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pytest_vram.memory import Peak, Phase, Timeline
from pytest_vram.report.chart import curve
from pytest_vram.units import MIB


def timeline(*sizes: int) -> Timeline:
    peak = max(range(len(sizes)), key=sizes.__getitem__, default=0)
    return Timeline(times=tuple(map(float, range(len(sizes)))), allocated=sizes, peak_index=peak, events=9)


def test_a_curve_rises_and_falls_with_the_memory() -> None:
    assert curve(timeline(0, MIB, 2 * MIB, MIB), width=4, height=2) == [
        " 2.00 MiB ┤  █",
        "          │ ███",
        "           peak 2.00 MiB, over 9 allocations and frees",
    ]


def test_the_budget_is_a_line_where_it_lies() -> None:
    drawn = curve(timeline(0, 4 * MIB, MIB), limit=2 * MIB, width=6, height=4)
    assert drawn[0] == " 4.00 MiB ┤  ██"
    assert drawn[1] == " 2.00 MiB ┼╌╌██╌╌"
    assert "budget 2.00 MiB ╌" in drawn[-1]


def test_a_budget_just_below_the_peak_is_what_its_row_is_named_after() -> None:
    drawn = curve(timeline(0, 4 * MIB), limit=4 * MIB - 1024, width=4, height=4)
    assert drawn[0] == " 4.00 MiB ┼╌╌██"
    assert drawn[-1].startswith(f"{'':11}peak 4.00 MiB, budget 4.00 MiB ╌")


def test_a_budget_above_the_peak_is_not_drawn() -> None:
    assert "╌" not in "".join(curve(timeline(0, MIB), limit=2 * MIB))


def test_nothing_held_is_nothing_drawn() -> None:
    assert curve(timeline()) == []
    assert curve(timeline(0, 0)) == []


def phase(name: str, start: float, end: float, parent: str | None = None) -> Phase:
    return Phase(name=name, start=start, end=end, parent=parent, peak=Peak())


def test_phases_are_named_below_where_they_ran() -> None:
    phases = [phase("forward", 0, 4), phase("inner", 1, 2, "forward"), phase("backward", 5, 8.5), phase("step", 9, 9)]
    drawn = curve(timeline(*range(10)), width=20, height=2, phases=phases)
    assert drawn[-2] == f"{'':11}╰forward─╯╰backw…╯"
    assert "forward" not in "".join(curve(timeline(*range(10)), width=20, height=2))


@given(
    st.lists(st.integers(0, 2**40), min_size=1, max_size=300), st.none() | st.integers(0, 2**41), st.integers(10, 90)
)
def test_a_curve_keeps_its_width_and_shows_the_peak(sizes: list[int], limit: int | None, width: int) -> None:
    drawn = curve(timeline(*sizes), limit=limit, width=width, height=4)
    assert len(drawn) == (5 if max(sizes) else 0)
    assert all(len(line) <= width + 11 for line in drawn[:-1])
    assert not drawn or "█" in drawn[0]
