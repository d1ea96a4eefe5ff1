"""What a person reads when a budget is broken, from a measurement alone."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from pytest_vram.memory import Budget, Measurement, Note
from pytest_vram.plugin.failure import budget_message
from pytest_vram.units import GIB

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "golden"))
import sample


def message(measurement: Measurement, metric: str = "allocated", limit: int = 12 * GIB) -> list[str]:
    budget = Budget(limit_bytes=limit, metric=metric, where="test_train.py:9")  # type: ignore[arg-type]  # one of the Literal's values
    peak = measurement.figure(metric) or 0
    text = budget_message(budget, limit, peak, measurement, phase=None, holders=measurement.holders)
    return text.splitlines()


def measured() -> Measurement:
    """The broken budget of the sample, without the fixture that would be the first thing to try."""
    (found,) = sample.report().tests[0].measurements
    return replace(found, fixtures=())


def test_holders_have_their_share_and_the_rest_is_told() -> None:
    lines = message(measured())
    start = lines.index("  held at the peak, by the line that allocated it:")
    assert lines[start + 1 : start + 4] == [
        "     9.00 GiB  model.py:41 in forward  (64%, activations, mlp, 64 allocations)",
        "     4.00 GiB  conftest.py:12 in llama  (29%, weights, 291 allocations)",
        "     1.00 GiB  elsewhere",
    ]


def test_a_budget_that_a_card_may_keep_is_told() -> None:
    pool = Note(name="cudaMallocAsync", text="a guess", source="driver")
    found = replace(measured(), notes=(pool,))
    peak = found.figure("reserved") or 0
    near = message(found, "reserved", limit=peak - peak // 100)
    assert any(line.startswith("  likely  a card needs between ") for line in near)
    assert not any("likely" in line for line in message(found, "reserved", limit=peak // 2))
    assert not any("likely" in line for line in message(found, "allocated", limit=(found.figure("allocated") or 0) - 1))


def test_the_remedy_is_for_the_kind_of_memory_that_there_was_most_of() -> None:
    assert message(measured())[-1] == (
        "  try: activations hold 9.00 GiB of it (64%), most of it from model.py:41 in forward: activation"
        " checkpointing, a smaller micro-batch, or shorter rows"
    )


def test_phases_that_come_again_are_named_once_with_their_largest_peak() -> None:
    found = measured()
    lines = message(replace(found, phases=found.phases * 3))
    assert "  phases  forward 13.0 GiB (3 times), backward 14.0 GiB (3 times)" in lines


def test_the_curve_has_an_axis_and_the_phases_below() -> None:
    lines = message(measured())
    assert any(line.startswith("   12.0 GiB ┼") for line in lines)
    assert any("╰" in line and "backward" in line for line in lines)


def test_what_the_allocator_only_keeps_is_no_activation() -> None:
    found = measured()
    reserved = replace(found, peak=replace(found.peak, allocated_bytes=11 * GIB, reserved_bytes=14 * GIB))
    assert "only 11.0 GiB were allocated" in message(reserved, metric="reserved")[-1]
