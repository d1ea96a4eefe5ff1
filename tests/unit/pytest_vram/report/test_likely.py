"""The bounds of a peak that rests on a guess, as each report shows them."""

from __future__ import annotations

import json

from pytest_vram.memory import Budget, Device, Environment, Measurement, Note, Peak, Report, Spread, TestRecord, Within
from pytest_vram.report import html, likely, markdown, terminal
from pytest_vram.report.html.data import page_data
from pytest_vram.report.rows import row
from pytest_vram.units import GIB, MIB

CARD = Device(kind="dry", index=0, name="a card")
FP32 = Note(name="cuDNN convolutions", text="a guess", source="driver", size_bytes=500 * MIB)
EXACT = Note(name="NCCL", text="buffers are taken as documented", source="driver")


def record(note: Note, *, metric: str = "reserved", limit: int = 8 * GIB) -> TestRecord:
    peak = Peak(allocated_bytes=3 * GIB, reserved_bytes=4 * GIB, device_bytes=5 * GIB)
    size = {"allocated": 3, "reserved": 4, "device": 5}[metric] * GIB
    return TestRecord(
        nodeid="test_conv.py::test_step",
        outcome="passed",
        budget=Budget(limit_bytes=limit, metric=metric),  # type: ignore[arg-type]  # one of three names
        measurements=(Measurement(device=CARD, peak=peak, notes=(note,)),),
        verdict=Within(headroom_bytes=limit - size),
    )


def report(*tests: TestRecord) -> Report:
    return Report(environment=Environment(python="3.11", pytest_vram="0.1.0", devices=(CARD,)), tests=tests)


def test_the_bounds_are_those_of_the_metric() -> None:
    reserved = likely.spread(row(record(FP32)))
    allocated = likely.spread(row(record(FP32, metric="allocated")))
    assert reserved is not None
    assert allocated is not None
    assert reserved.high == 4 * GIB + 45 * MIB + 546 * MIB, "the workspace may take a segment of its own"
    assert allocated.high == 3 * GIB + 45 * MIB
    assert likely.spread(row(record(EXACT))) is None


def test_the_context_is_in_both_bounds_and_not_widened() -> None:
    pool = Note(name="cudaMallocAsync", text="a guess", source="driver")
    found = likely.on_device(1500, 500, [pool])
    assert found == Spread(low=1480, expected=1500, high=1520)


def test_bounds_that_read_the_same_are_written_once() -> None:
    near = Spread(low=435 * MIB, expected=435 * MIB + 1000, high=435 * MIB + 2000, basis="a basis")
    assert likely.words(near) == "about 435 MiB, a basis"
    apart = Spread(low=435 * MIB, expected=436 * MIB, high=437 * MIB, basis="a basis")
    assert likely.words(apart) == "between 435 MiB and 437 MiB, a basis"


def test_a_passing_test_shows_them_in_every_report() -> None:
    whole = report(record(FP32))
    words = "between 3.96 GiB and 4.58 GiB"
    assert words in terminal.render(whole)
    assert words in markdown.render(whole)
    assert words in json.dumps(page_data(whole))
    page = html.render(whole)
    assert "Peaks that rest on a guess" in page
    assert "4.58 GiB</td>" in page


def test_a_figure_that_rests_on_no_guess_has_none() -> None:
    whole = report(record(EXACT))
    for text in (terminal.render(whole), markdown.render(whole), html.render(whole), json.dumps(page_data(whole))):
        assert "likely between" not in text
        assert "eaks that rest on a guess" not in text


def test_a_budget_between_the_bounds_makes_the_verdict_only_likely() -> None:
    assert "only likely" in terminal.render(report(record(FP32, limit=4 * GIB + 100 * MIB)))
    assert "only likely" not in terminal.render(report(record(FP32)))
    assert '<td class="" data-head="verdict">only likely</td>' in html.render(
        report(record(FP32, limit=4 * GIB + 100 * MIB))
    )
