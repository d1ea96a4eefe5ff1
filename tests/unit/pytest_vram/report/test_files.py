from __future__ import annotations

import csv
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

import pytest_vram
from pytest_vram import baseline, cli
from pytest_vram.errors import VramUsageError
from pytest_vram.memory import Device, Environment, Measurement, Peak, Report, TestRecord, Work
from pytest_vram.report import disk, files, terminal

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "golden"))
import sample

CARD = Device(kind="dry", index=0, name="a card")
ENVIRONMENT = Environment(python="3.11", pytest_vram="0.1.0", devices=(CARD,))


def report(*sizes: int) -> Report:
    tests = tuple(
        TestRecord(
            nodeid=f"test_{i}",
            outcome="passed",
            measurements=(Measurement(device=CARD, peak=Peak(allocated_bytes=size)),),
        )
        for i, size in enumerate(sizes)
    )
    return Report(environment=ENVIRONMENT, tests=tests)


def schema() -> dict[str, object]:
    return dict(json.loads(files.SCHEMA_FILE.read_text()))


def test_json_comes_back(tmp_path: Path) -> None:
    files.save(report(1, 2), tmp_path / "deep" / "er" / "r.json")
    assert files.load(tmp_path / "deep" / "er" / "r.json") == report(1, 2)


def test_json_is_as_the_published_schema_says() -> None:
    jsonschema.validate(json.loads(files.to_json(report(1, 2))), schema())


@pytest.mark.parametrize("change", [{"schema_version": 2}, {"tests": [{"nodeid": "x"}]}, {"misspelt": 1}])
def test_the_schema_refuses_what_is_no_report(change: dict[str, object]) -> None:
    data = json.loads(files.to_json(report(1))) | change
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, schema())


@pytest.mark.parametrize("name", ["r.txt", "r", "r.JSON.bak"])
def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(VramUsageError, match=r"\.json, \.md, \.csv, \.html"):
        files.save(report(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    files.save(report(1), path)
    before = path.read_text()

    def full(self: Path, *args: object, **kwargs: object) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        files.save(report(2), path)
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["r.json"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "cannot be read"),
        ("[]", "is of version None"),
        ('{"schema_version": 99, "environment": {}, "tests": []}', "is of version 99, and this pytest-vram reads 1"),
        ('{"schema_version": 1, "tests": []}', "Report has no 'environment'"),
        (
            '{"schema_version": 1, "environment": {"python": 3, "pytest_vram": ""}, "tests": []}',
            r"Report.environment.python is 3, which is not str",
        ),
        (
            '{"schema_version": 1, "environment": {"python": "", "pytest_vram": ""}, "tests": [{"nodeid": "a",'
            ' "outcome": "", "verdict": {"verdict": "maybe"}}]}',
            r"Report.tests\[0\].verdict",
        ),
        ("\udcff", "cannot be read"),
    ],
)
def test_what_is_no_report_is_refused_with_the_place(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(VramUsageError, match=complaint) as error:
        files.load(path)
    assert "r.json" in str(error.value)


def test_a_missing_report_says_so(tmp_path: Path) -> None:
    with pytest.raises(VramUsageError, match="is not there"):
        files.load(tmp_path / "none.json")


def test_fields_of_a_later_version_are_passed_over(tmp_path: Path) -> None:
    data = json.loads(files.to_json(report(5)))
    data["tests"][0]["mood"] = "good"
    (tmp_path / "r.json").write_text(json.dumps(data))
    assert files.load(tmp_path / "r.json") == report(5)


def test_csv_has_a_row_a_test_and_nothing_where_there_is_no_figure() -> None:
    text = files.to_csv(
        replace(report(10, 20), tests=(*report(10, 20).tests, TestRecord(nodeid='x,"y', outcome="skipped")))
    )
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["nodeid"], row["peak_bytes"]) for row in rows] == [("test_1", "20"), ("test_0", "10"), ('x,"y', "")]


def test_the_work_of_a_test_is_in_csv_and_in_the_data_frame(tmp_path: Path) -> None:
    first, second = report(10, 20).tests
    work = Work(launches=1204, synchronizations=2, copied_to_device_bytes=64, copied_to_host_bytes=0)
    asked = replace(second, measurements=(replace(second.measurements[0], work=work),))
    found = replace(report(10, 20), tests=(first, asked))
    names = ("launches", "synchronizations", "copied_to_device_bytes", "copied_to_host_bytes")
    rows = list(csv.DictReader(io.StringIO(files.to_csv(found))))
    assert [[row[name] for name in names] for row in rows] == [["1204", "2", "64", "0"], [""] * 4]
    files.save(found, tmp_path / "r.json")
    assert pytest_vram.load_report(tmp_path / "r.json").loc["test_1", list(names)].tolist() == [1204, 2, 64, 0]


def test_a_report_is_a_data_frame(tmp_path: Path) -> None:
    files.save(report(10, 20), tmp_path / "r.json")
    frame = pytest_vram.load_report(tmp_path / "r.json")
    assert list(frame.index) == ["test_1", "test_0"]
    assert frame.loc["test_0", "peak_bytes"] == 10
    assert frame["kind"].unique().tolist() == ["dry"]


def test_what_was_recorded_is_a_data_frame_too(tmp_path: Path) -> None:
    files.save(sample.report(), tmp_path / "r.json")
    over_time = pytest_vram.load_report(tmp_path / "r.json", table="timeline")
    assert over_time["seconds"].tolist() == list(sample.timeline().times)
    assert over_time.loc[over_time["peak"], "activations_bytes"].tolist() == [9 * 2**30]
    assert (over_time[["weights_bytes", "activations_bytes", "gradients_bytes"]].sum(axis=1)).tolist() == (
        over_time["allocated_bytes"].tolist()
    )
    holders = pytest_vram.load_report(tmp_path / "r.json", table="holders")
    assert holders["location"].tolist() == ["model.py:41 in forward", "conftest.py:12 in llama"]
    segments = pytest_vram.load_report(tmp_path / "r.json", table="segments")
    layout = sample.layout()
    assert (segments["count"] * segments["size_bytes"]).sum() == layout.reserved_bytes
    assert (segments["count"] * segments["active_bytes"]).sum() == layout.allocated_bytes
    assert segments["location"][0] == "model.py:41 in forward"
    with pytest.raises(VramUsageError, match="choose tests, timeline, holders, segments"):
        pytest_vram.load_report(tmp_path / "r.json", table="fixtures")


def test_a_report_is_held_against_a_baseline_or_an_earlier_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = report(2**20, 2**21), report(2**21, 2**21)
    files.save(old, tmp_path / "old.json")
    files.save(new, tmp_path / "new.json")
    baseline.update(tmp_path / "vram.json", old)
    for source in ("old.json", "vram.json"):
        page = tmp_path / "page.html"
        assert (
            cli.main(["report", str(tmp_path / "new.json"), "--baseline", str(tmp_path / source), "-o", str(page)]) == 0
        )
        assert f"<b>1 test needs over 2% more</b> than in {source}" in page.read_text(encoding="utf-8")
    held = baseline.held_against(new, baseline.peaks(old), source="old.json", tolerance=2)
    assert r"| test\_0 | 2.00 MiB | +1.00 MiB |" in files.markdown.render(held)
    assert "2.00 MiB  +1.00 MiB test_0" in terminal.render(held)
    assert cli.main(["report", str(tmp_path / "new.json"), "--baseline", str(tmp_path / "none.json")]) == 2
    assert "none.json is not there" in capsys.readouterr().err


def test_a_place_where_nothing_can_be_written_is_refused_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path, why in (
        (tmp_path / "file" / "r.json", "--json .*r.json cannot be written: (File exists|Not a directory)"),
        (tmp_path / "folder", "--json .*folder cannot be written: it is a folder; name another place"),
    ):
        with pytest.raises(VramUsageError, match=why):
            disk.refuse_unwritable(path, "--json")
    disk.refuse_unwritable(tmp_path / "new" / "r.json", "--json")
    assert list((tmp_path / "new").iterdir()) == [], "nothing is left there"


def test_a_command_that_cannot_write_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.save(report(1), tmp_path / "r.json")
    assert cli.main(["report", str(tmp_path / "r.json"), "-o", str(tmp_path / "r.json" / "r.md")]) == 2
    assert capsys.readouterr().err.startswith(f"pytest_vram: {tmp_path / 'r.json'}: ")


def test_a_file_that_is_no_report_is_not_called_broken(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text("import pytest")
    with pytest.raises(VramUsageError, match=r"cannot be read: .*Is it the right file"):
        files.load(tmp_path / "test_mine.py")
