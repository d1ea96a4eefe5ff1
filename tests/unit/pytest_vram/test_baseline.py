from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_vram import baseline
from pytest_vram.commands import compare
from pytest_vram.errors import VramUsageError
from pytest_vram.memory import Device, Environment, Measurement, Peak, Report, TestRecord
from pytest_vram.report.rows import row_change, rows
from pytest_vram.units import MIB

A = Device(kind="cuda", index=0, name="A")
DRY_A = Device(kind="dry", index=0, name="A")


def record(nodeid: str, size: int, device: Device = A, outcome: str = "passed") -> TestRecord:
    return TestRecord(
        nodeid=nodeid,
        outcome=outcome,
        measurements=(Measurement(device=device, peak=Peak(allocated_bytes=size)),),
    )


def report(*tests: TestRecord) -> Report:
    return Report(environment=Environment(python="3.11", pytest_vram="0.1.0"), tests=tests)


def test_growth_is_a_regression_only_past_the_tolerance() -> None:
    before = {"t": {"A (cuda)": 100 * MIB}}
    at_limit, above = 102 * MIB + 512, 102 * MIB + 513
    assert baseline.compare(report(record("t", at_limit)), before, 2).regressed == ()
    (change,) = baseline.compare(report(record("t", above)), before, 2).regressed
    assert (change.before_bytes, change.after_bytes) == (100 * MIB, above)
    assert change.percent == pytest.approx(2.0, abs=0.01)


def test_shrinking_is_an_improvement_past_the_tolerance() -> None:
    before = {"t": {"A (cuda)": 100 * MIB}}
    assert baseline.compare(report(record("t", 98 * MIB)), before, 2).improved == ()
    (change,) = baseline.compare(report(record("t", 97 * MIB)), before, 2).improved
    assert change.percent == pytest.approx(-3)


def test_figures_of_another_kind_are_not_compared() -> None:
    changes = baseline.compare(report(record("t", 900 * MIB, DRY_A)), {"t": {"A (cuda)": MIB}}, 2)
    assert changes.regressed == ()
    assert changes.missing == ("t",)


def test_what_fixtures_of_other_tests_hold_does_not_count() -> None:
    measured = Measurement(device=A, peak=Peak(allocated_bytes=10 * MIB), uncounted_bytes=4 * MIB)
    assert baseline.peaks(report(TestRecord(nodeid="t", outcome="passed", measurements=(measured,)))) == {
        "t": {"A (cuda)": 6 * MIB}
    }


def test_an_update_writes_what_ran_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    baseline.update(path, report(record("b", 2 * MIB), record("a", MIB)))
    baseline.update(path, report(record("a", 3 * MIB), record("c", MIB, DRY_A), record("b", 9 * MIB, outcome="failed")))
    assert baseline.read(path) == {
        "a": {"A (cuda)": 3 * MIB},
        "b": {"A (cuda)": 2 * MIB},
        "c": {"A (dry)": MIB},
    }


def test_the_file_is_sorted_with_a_line_a_test(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    baseline.update(path, report(record("z", MIB), record("a[ü]", MIB), record("a[ü]", MIB, DRY_A)))
    lines = path.read_text().splitlines()
    assert lines[3:5] == [
        f'    {json.dumps("a[ü]")}: {{"A (cuda)": {MIB}, "A (dry)": {MIB}}},',
        f'    "z": {{"A (cuda)": {MIB}}}',
    ]
    assert json.loads(path.read_text())["version"] == 1


def test_a_file_that_is_no_baseline_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    path.write_text('{"precious": 1}')
    with pytest.raises(VramUsageError, match="version None, not 1"):
        baseline.update(path, report(record("a", MIB)))
    assert path.read_text() == '{"precious": 1}'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "cannot be read"),
        ("[1]", "version None"),
        ('{"version": 1, "peaks": []}', "version 1"),
        ('{"version": 1, "peaks": {"t": {"A": -1}}}', "entry of 't'"),
        ('{"version": 1, "peaks": {"t": {"A": true}}}', "entry of 't'"),
        ('{"version": 1, "peaks": {"t": 3}}', "entry of 't'"),
    ],
)
def test_a_broken_baseline_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(text)
    with pytest.raises(VramUsageError, match=complaint):
        baseline.read(path)


def test_a_missing_baseline_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(VramUsageError, match="--vram-update-baseline writes it"):
        baseline.read(tmp_path / "none.json")


def test_the_message_names_sizes_percent_card_and_remedy() -> None:
    (change,) = baseline.compare(report(record("t", 3 * MIB)), {"t": {"A (cuda)": 2 * MIB}}, 2).regressed
    text = change.message(Path("base.json"))
    for part in (
        "t grew from 2.00 MiB to 3.00 MiB (+50.0%) on A (cuda)",
        "2% over base.json",
        "--vram-update-baseline",
    ):
        assert part in text


def test_a_test_that_needed_no_memory_before_grew_and_is_not_new() -> None:
    before = report(
        record("grows", 0), record("rests", 0), record("stops", 8 * MIB), record("skipped", 0, A, "skipped")
    )
    after = report(record("grows", 4 * MIB), record("rests", 0), record("stops", 0), record("added", 0))
    old, new = baseline.peaks(before, failed=True), baseline.peaks(after, failed=True)
    found = baseline.compare(after, old, 2)
    assert [(change.nodeid, change.percent_text) for change in found.regressed] == [("grows", "was 0 B")]
    assert [(change.nodeid, change.percent_text) for change in found.improved] == [("stops", "-100.0%")]
    assert baseline.only_in(new, old) == baseline.only_in(old, new) == []
    assert set(baseline.peaks(before)) == {"stops"}, "a baseline file has no line for tests that need no memory"
    assert "skipped" not in old
    text, grew = compare.render(before, after, 2, 80)
    assert grew
    assert "  was 0 B        0 B -> 4.00 MiB   grows" in text
    held = rows(baseline.held_against(after, baseline.peaks(before), source="peaks.json", tolerance=2))
    changes = {row.nodeid: row_change(row) for row in held}
    assert changes == {"grows": "new", "rests": "", "stops": "−8.00 MiB", "added": ""}
