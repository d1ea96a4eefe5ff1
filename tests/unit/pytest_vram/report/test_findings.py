from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from formats import SARIF, read_command

from pytest_vram import baseline
from pytest_vram.memory import (
    Budget,
    Device,
    Environment,
    Exceeded,
    Holder,
    HostPeak,
    Measurement,
    Peak,
    Report,
    TestRecord,
    Unmeasured,
)
from pytest_vram.report import code_quality, files, sarif, workflow
from pytest_vram.report.findings import Finding, Place, Places, findings
from pytest_vram.units import GIB, MIB

if TYPE_CHECKING:
    from pathlib import Path

CARD = Device(kind="dry", index=0, name="a card")


def record(nodeid: str, *holders: tuple[int, str], **fields: Any) -> TestRecord:
    held = tuple(Holder(size_bytes=size, count=1, location=where) for size, where in holders)
    measured = Measurement(device=CARD, peak=Peak(allocated_bytes=3 * GIB), holders=held, **fields.pop("m", {}))
    return TestRecord(**{"nodeid": nodeid, "outcome": "failed", "measurements": (measured,), **fields})


def over(nodeid: str, *holders: tuple[int, str]) -> TestRecord:
    budget = Budget(limit_bytes=2 * GIB, where="tests/test_a.py:7")
    return record(nodeid, *holders, budget=budget, verdict=Exceeded(over_bytes=GIB))


def report(*tests: TestRecord) -> Report:
    return Report(environment=Environment(python="3", pytest_vram="0", devices=(CARD,)), tests=tests)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """A repository whose tests run in its folder ``sub dir``."""
    for name in ("sub dir/model.py", "sub dir/tests/test_a.py", "shared.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    return Places(tmp_path / "sub dir", tmp_path)


def test_the_lines_that_hold_the_most_are_named_relative_to_the_repository(places: Places) -> None:
    holders = [(GIB, "model.py:41 in forward"), (MIB, "../shared.py:3 in load"), (2 * GIB, "peft/tuners.py:9 in lora")]
    found = findings(report(over("tests/test_a.py::test_x", *holders)), places)
    assert [finding.place for finding in found] == [
        Place(path="sub dir/model.py", line=41),
        Place(path="shared.py", line=3),
    ]
    assert "needs 3.00 GiB of allocated memory, 1.00 GiB more than its budget of 2.00 GiB" in found[0].text
    assert "This line holds 1.00 GiB at the peak" in found[0].text


def test_three_lines_at_most_and_a_line_twice_is_one_line(places: Places) -> None:
    holders = [(MIB * n, f"model.py:{n} in f") for n in range(1, 6)]
    found = findings(report(over("t", (MIB, "model.py:5 in f"), *holders)), places)
    assert [finding.place.line for finding in found if finding.place] == [5, 4, 3]
    assert "This line holds 6.00 MiB" in found[0].text


def test_without_a_line_of_the_repository_the_budget_is_named_and_else_the_file(places: Places) -> None:
    (budget,) = findings(report(over("tests/test_a.py::test_x", (GIB, "backward pass"))), places)
    assert budget.place == Place(path="sub dir/tests/test_a.py", line=7)
    bare = record("tests/test_a.py::test_y", m={"baseline_bytes": GIB})
    (grew,) = findings(baseline.held_against(report(bare), {}, source="b", tolerance=2), places) or [None]
    assert grew is None, "no entry in the baseline"
    held = baseline.held_against(report(bare), {bare.nodeid: {"a card (dry)": GIB}}, source="b", tolerance=2)
    (grew,) = findings(held, places)
    assert (grew.rule, grew.place) == ("grew", Place(path="sub dir/tests/test_a.py", line=1))
    assert "+2.00 GiB over its baseline of 1.00 GiB" in grew.text
    (lost,) = findings(
        report(record("gone.py::test_z", budget=Budget(limit_bytes=1), verdict=Exceeded(over_bytes=1))), places
    )
    assert lost.place is None


def test_what_is_left_behind_and_what_is_not_measured(places: Places) -> None:
    leak = record(
        "t", (GIB, "model.py:2 in f"), budget=Budget(limit_bytes=None, max_leak_bytes=0), m={"leaked_bytes": MIB}
    )
    reason = Unmeasured(reason="torch is\nnot installed")
    blind = TestRecord(nodeid="u", outcome="skipped", budget=Budget(limit_bytes=GIB), verdict=reason)
    within = record(
        "w", (MIB, "model.py:2 in f"), budget=Budget(limit_bytes=None, max_leak_bytes=MIB), m={"leaked_bytes": MIB}
    )
    found = findings(report(leak, blind, within), places)
    assert [(finding.rule, finding.level) for finding in found] == [
        ("left-memory", "error"),
        ("not-measured", "warning"),
    ]
    assert found[0].text.endswith("This line holds 1.00 GiB at the peak."), "of 1 MiB that is left"
    assert found[1].text == "u has a budget that was not measured: torch is not installed"


def test_a_fingerprint_stays_when_lines_move_and_differs_between_tests(places: Places) -> None:
    def prints(nodeid: str, line: int) -> str:
        return findings(report(over(nodeid, (GIB, f"model.py:{line} in f"))), places)[0].fingerprint

    assert prints("t", 3) == prints("t", 30) != prints("u", 3)


@pytest.mark.parametrize("text", ["plain", "100% of a,b: c::d", "two\nlines\r\n", "%0A %25 %3A", "x=1,y=2"])
def test_a_command_is_read_back_as_it_was_written(text: str) -> None:
    name, properties, message = read_command(workflow.command("error", text, title=text, file=text, line="3"))
    assert (name, message) == ("error", text)
    assert properties == {"title": text, "file": text, "line": "3"}


def test_tests_that_blame_one_line_share_a_command(places: Places) -> None:
    both = report(*(over(f"t[{name}]", (GIB, "model.py:41 in forward")) for name in ("a,b", "100%")))
    (line,) = workflow.render(findings(both, places))
    name, properties, message = read_command(line)
    assert (name, properties["file"], properties["line"]) == ("error", "sub dir/model.py", "41")
    assert len(message.splitlines()) == 2
    assert "t[a,b] needs" in message
    assert "t[100%] needs" in message


def test_more_lines_than_github_shows_are_counted() -> None:
    many = [
        Finding(
            rule="grew", level="error", nodeid=f"t{i}", text="x", place=Place(path="a.py", line=i + 1), fingerprint=""
        )
        for i in range(12)
    ]
    lines = workflow.render(many)
    assert len(lines) == workflow.MOST
    assert read_command(lines[-1])[2].startswith("3 more lines;")
    assert len(workflow.render(many[:10])) == 10
    assert all("more lines" not in line for line in workflow.render(many[:10]))


def test_sarif_is_valid_and_quotes_paths(places: Places) -> None:
    tests = (
        over("tests/test_a.py::test_x", (GIB, "model.py:41 in forward")),
        over("zone.py::test", (1, "backward pass")),
    )
    data = json.loads(sarif.render(report(*tests), places))
    jsonschema.validate(data, SARIF)
    (run,) = data["runs"]
    first = run["results"][0]
    assert run["tool"]["driver"]["rules"][first["ruleIndex"]]["id"] == first["ruleId"] == "over-budget"
    where = first["locations"][0]["physicalLocation"]
    assert where["artifactLocation"]["uri"] == "sub%20dir/model.py"
    assert where["region"]["startLine"] == 41


def test_code_quality_has_what_gitlab_asks_for(places: Places) -> None:
    tests = (
        over("tests/test_a.py::test_x", (GIB, "model.py:41 in forward")),
        over("zone.py::test", (1, "backward pass")),
    )
    issues = json.loads(code_quality.render(report(*tests), places))
    assert [issue["location"] for issue in issues] == [
        {"path": "sub dir/model.py", "lines": {"begin": 41}},
        {"path": "sub dir/tests/test_a.py", "lines": {"begin": 7}},
    ]
    assert {issue["severity"] for issue in issues} == {"major"}
    assert len({issue["fingerprint"] for issue in issues}) == 2
    assert all(issue["description"] and issue["check_name"] == "pytest-vram/over-budget" for issue in issues)


def test_the_longest_suffix_says_the_format(tmp_path: Path) -> None:
    for name, start in (("a.json", "{"), ("a.codequality.json", "["), ("a.sarif", "{")):
        files.save(report(), tmp_path / name)
        assert (tmp_path / name).read_text().startswith(start)
    assert files.load(tmp_path / "a.json").tests == ()


def test_a_broken_budget_of_host_memory_is_a_finding_in_every_format(places: Places) -> None:
    """The lines of the row hold memory of the device, so the budget is named in place of one."""
    host = HostPeak(limit_bytes=GIB, peak_bytes=3 * GIB)
    budget = Budget(limit_bytes=None, where="tests/test_a.py:7")
    test = record("tests/test_a.py::test_x", (GIB, "model.py:41 in forward"), host=host, budget=budget)
    bare = TestRecord(nodeid="tests/test_a.py::test_y", outcome="failed", host=host, budget=budget)
    kept = TestRecord(nodeid="z", outcome="passed", host=HostPeak(limit_bytes=3 * GIB, peak_bytes=3 * GIB))
    found = findings(report(test, bare, kept), places)
    assert [(finding.rule, finding.level) for finding in found] == [("over-host-budget", "error")] * 2
    assert {finding.place for finding in found} == {Place(path="sub dir/tests/test_a.py", line=7)}
    assert found[0].text.endswith("needs 3.00 GiB of host memory, 2.00 GiB more than its budget of 1.00 GiB")
    (line,) = workflow.render(found)
    assert read_command(line)[1]["title"] == "Host memory over budget"
    data = json.loads(sarif.render(report(test), places))
    jsonschema.validate(data, SARIF)
    assert data["runs"][0]["results"][0]["ruleId"] == "over-host-budget"
    (issue,) = json.loads(code_quality.render(report(test), places))
    assert issue["check_name"] == "pytest-vram/over-host-budget"
