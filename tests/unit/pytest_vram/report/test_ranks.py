"""Processes below a test, in every form of the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_vram import baseline
from pytest_vram.memory import Device, Environment, Measurement, Peak, Process, Report, TestRecord
from pytest_vram.memory.process import cards_of, imbalance
from pytest_vram.report import files, markdown, terminal
from pytest_vram.report.rows import rows

if TYPE_CHECKING:
    from pathlib import Path

GIB = 2**30


def measured(size: int, card: int = 0) -> Measurement:
    device = Device(kind="dry", index=card, uuid=f"GPU-{card}", name="NVIDIA L4")
    return Measurement(device=device, peak=Peak(allocated_bytes=size, reserved_bytes=size + 1))


def rank(number: int, size: int, card: int, began: float = 0.0, ended: float | None = None) -> Process:
    return Process(
        pid=100 + number,
        name="python train.py",
        rank=number,
        began=began,
        ended=ended,
        measurements=(measured(size, card),),
    )


def report(*processes: Process) -> Report:
    test = TestRecord(
        nodeid="test_it.py::test_ranks",
        outcome="passed",
        measurements=(measured(0),),
        processes=processes,
    )
    return Report(environment=Environment(python="3.11", pytest_vram="0"), tests=(test,))


TWO = (rank(0, 3 * GIB, 0), rank(1, 5 * GIB, 1))
LOST = Process(pid=9, name="python lost.py", began=0.0, missing="it used the GPU and ended", left=True, left_bytes=7)


def test_the_largest_rank_is_the_tests_figure_and_comes_first() -> None:
    (row,) = rows(report(*TWO))
    assert row.peak_bytes == 5 * GIB
    assert [found.rank for found in row.ranks] == [1, 0]
    assert row.imbalance == 0.25


def test_every_form_shows_the_ranks_side_by_side(tmp_path: Path) -> None:
    shown = report(*TWO, LOST)
    for text in (terminal.render(shown, width=100), markdown.render(shown), files.to_html(shown)):
        assert text.index("rank 1 (PID 101)") < text.index("rank 0 (PID 100)")
        assert "25.0% more than the mean" in text
        assert "python lost.py (PID 9)" in text
    files.save(shown, tmp_path / "r.json")
    table = files.load_report(tmp_path / "r.json", table="ranks")
    assert list(table["peak_bytes"])[:2] == [5 * GIB, 3 * GIB]
    assert list(table["pid"]) == [101, 100, 9]
    assert list(table["missing"]) == ["", "", "it used the GPU and ended"]
    tests = files.load_report(tmp_path / "r.json")
    assert tests["rank_count"].tolist() == [3]
    assert files.load(tmp_path / "r.json") == shown


def test_a_baseline_counts_every_process_of_a_card() -> None:
    one_card = report(rank(0, 3 * GIB, 0), rank(1, 5 * GIB, 0))
    assert list(baseline.peaks(one_card)["test_it.py::test_ranks"].values()) == [8 * GIB]
    assert list(baseline.peaks(report(*TWO))["test_it.py::test_ranks"].values()) == [5 * GIB]


def test_only_lives_that_overlap_add_up() -> None:
    one, two = rank(0, 3 * GIB, 0, began=0, ended=10), rank(1, 5 * GIB, 0, began=10, ended=20)
    three = rank(2, 4 * GIB, 0, began=9, ended=11)
    assert cards_of((), (one, two), "allocated")[0].size_bytes == 5 * GIB
    assert cards_of((), (one, two, three), "allocated")[0].size_bytes == 9 * GIB
    assert cards_of((measured(GIB),), (one, two), "allocated")[0].size_bytes == 6 * GIB
    assert [card.size_bytes for card in cards_of((), (one, two), "allocated", each=True)] == [5 * GIB, 3 * GIB]


def test_imbalance_is_over_the_mean() -> None:
    assert imbalance([3, 5]) == 0.25
    assert imbalance([4, 4, 4]) == 0
    assert imbalance([4]) is None
    assert imbalance([0, 0]) is None
