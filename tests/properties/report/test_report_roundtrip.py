"""Any report comes back from its JSON as it was, fits the schema, and renders in every format."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

import jsonschema
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_vram import baseline
from pytest_vram.memory import (
    Budget,
    Device,
    Environment,
    Exceeded,
    Measurement,
    Peak,
    Report,
    TestRecord,
    Timeline,
    Within,
)
from pytest_vram.memory.codec import decode, encode
from pytest_vram.report import disk, files, markdown, terminal
from pytest_vram.report.rows import rows

VALIDATOR = jsonschema.Draft202012Validator(json.loads(files.SCHEMA_FILE.read_text()))
SIZES = st.integers(0, 2**50)
# A report is UTF-8 text: lone surrogates do not occur in node ids.
TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Anything that a field's type allows."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values(argument) for argument in arguments])
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    if dataclasses.is_dataclass(hint):
        return objects(hint)
    plain = {int: SIZES, str: TEXTS, bool: st.booleans(), float: st.floats(0, 1e6), type(None): st.none()}
    return plain[hint]


def objects(cls: Any) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    fields = {f.name: values(hints[f.name]) for f in dataclasses.fields(cls) if f.name != "schema_version"}
    return st.builds(cls, **fields)


def coherent(test: TestRecord) -> TestRecord:
    """A verdict needs the budget and the figure that it speaks of."""
    measured = bool(test.measurements)
    if isinstance(test.verdict, (Within, Exceeded)) and not (test.budget and test.budget.limit_bytes and measured):
        return dataclasses.replace(test, verdict=None)
    return test


REPORTS = objects(Report).map(
    lambda report: dataclasses.replace(report, tests=tuple(coherent(test) for test in report.tests))
)
FEWER = settings(max_examples=settings.default.max_examples // 2)


@given(objects(Report))
@FEWER
def test_a_report_comes_back_from_json(report: Report) -> None:
    text = files.to_json(report)
    assert decode(Report, json.loads(text)) == report


@given(objects(Timeline))
@FEWER
def test_what_a_process_leaves_of_its_memory_comes_back(timeline: Timeline) -> None:
    assert decode(Timeline, json.loads(json.dumps(dataclasses.asdict(timeline)))) == timeline


@given(objects(Report))
@FEWER
def test_every_report_fits_the_schema(report: Report) -> None:
    VALIDATOR.validate(json.loads(files.to_json(report)))


@given(objects(Measurement))
@FEWER
def test_what_holds_its_default_is_left_out(measurement: Measurement) -> None:
    data = encode(measurement)
    for field in dataclasses.fields(Measurement):
        if field.default is not dataclasses.MISSING:
            assert (field.name in data) == (getattr(measurement, field.name) != field.default)


@given(REPORTS, st.integers(60, 200), st.integers(-1, 2))
@FEWER
def test_every_report_renders(report: Report, width: int, verbosity: int) -> None:
    assert terminal.render(report, width=width, verbosity=verbosity)
    assert files.to_csv(report)
    text = markdown.render(report)
    above, _, _ = text.partition("<details>")
    table, _, ranks = above.partition("| processes of |")
    assert len(rows_of(table)) == 1 + len(report.tests)
    assert len(rows_of(ranks)) >= sum(bool(test.processes) for test in report.tests)


def rows_of(table: str) -> list[str]:
    return [line for line in table.splitlines() if line.startswith("| ") and "---" not in line]


def test_a_budget_of_nothing_has_no_share_used() -> None:
    """No marker makes one; a report that says so is shown all the same."""
    device = Device(kind="cuda", index=0, name="a", uuid="", total_bytes=1, capability=(8, 9))
    measured = Measurement(device=device, peak=Peak(allocated_bytes=1), start_bytes=0)
    record = TestRecord(nodeid="t", outcome="passed", budget=Budget(limit_bytes=0), measurements=(measured,))
    (row,) = rows(Report(environment=Environment(python="", pytest_vram=""), tests=(record,)))
    assert row.used is None


@given(REPORTS)
@FEWER
def test_a_baseline_of_itself_has_no_regression(report: Report) -> None:
    changes = baseline.compare(report, baseline.peaks(report), 0)
    once = len({test.nodeid for test in report.tests}) == len(report.tests)
    assert not once or not changes.regressed
    assert not once or not changes.improved


PEAKS = st.dictionaries(TEXTS, st.dictionaries(TEXTS, SIZES, min_size=1, max_size=3), max_size=4)


@given(PEAKS)
@FEWER
def test_a_baseline_file_comes_back(tmp_path_factory: Any, peaks: dict[str, dict[str, int]]) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "baseline.json"
    disk.write_atomically(path, baseline.dump(peaks))
    assert baseline.read(path) == peaks
    assert path.read_text(encoding="utf-8").count("\n") == 5 + max(1, len(peaks))


@given(SIZES, SIZES, st.floats(0, 100))
def test_never_regressed_and_improved_at_once(before: int, after: int, tolerance: float) -> None:
    change = baseline.Change(nodeid="t", card="c", before_bytes=before, after_bytes=after, tolerance_percent=tolerance)
    assert not (change.regressed and change.improved)
    if before == after:
        assert not change.regressed
        assert not change.improved


@given(objects(Budget))
def test_a_budget_comes_back(budget: Budget) -> None:
    assert decode(Budget, json.loads(json.dumps(encode(budget)))) == budget
