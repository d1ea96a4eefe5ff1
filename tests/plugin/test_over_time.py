"""Memory over time reaches the report, and nothing that only passes figures on; recorded where it is asked for."""

from __future__ import annotations

import json
import re

RECORDS = """
from pytest_vram.memory import Series, Timeline

ASKED = []
begin = made_up_device.PROBE.begin_test

def begin_test(*, record, timeline=False):
    ASKED.append(timeline)
    begin(record=record)

def timeline(index):
    size = made_up_device.PROBE.high[index]
    categories = (Series(name="weights", sizes=(0, size)),)
    return Timeline(times=(0.0, 1.0), allocated=(0, size), categories=categories, peak_index=1, events=77)

made_up_device.PROBE.begin_test = begin_test
made_up_device.PROBE.timeline = timeline

def pytest_unconfigure():
    print("asked:", set(ASKED))
"""

TEST = """
    @pytest.mark.vram(max_mb=3)
    def test_it():
        free(alloc(2 * MB))
"""


def test_it_reaches_json_and_not_junit(project) -> None:
    project.conftest(RECORDS)
    project.write(TEST)
    project.run("--vram-timeline", "--vram-output=r.json", "--junitxml=r.xml")
    (test,) = json.loads((project.pytester.path / "r.json").read_text())["tests"]
    assert test["measurements"][0]["timeline"]["allocated"] == [0, 2 * 2**20]
    junit = (project.pytester.path / "r.xml").read_text()
    assert "allocated_bytes" in junit
    assert "timeline" not in junit


def test_it_comes_through_xdist(project) -> None:
    project.conftest(RECORDS)
    project.write(TEST)
    project.run("--vram-timeline", "--vram-output=r.json", "-n1", plugins=("xdist",))
    (test,) = json.loads((project.pytester.path / "r.json").read_text())["tests"]
    assert test["measurements"][0]["timeline"]["events"] == 77


def test_a_page_asks_for_it_and_a_table_does_not(project) -> None:
    project.conftest(RECORDS)
    project.write(TEST)
    assert "asked: {False}" in project.run("--vram-report", "-s").stdout.str()
    assert "asked: {True}" in project.run("--vram-output=r.html", "-s").stdout.str()
    page = (project.pytester.path / "r.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["tests"][0]["timeline"]["most"] == 2 * 2**20


def test_a_broken_budget_draws_it_in_the_terminal(project) -> None:
    project.conftest(RECORDS)
    project.write(TEST.replace("max_mb=3", "max_mb=1"))
    out = project.run().stdout.str()
    assert "peak 2.00 MiB, budget 1.00 MiB ╌, over 77 allocations and frees" in out
    assert "████" in out


def test_a_page_says_what_grew_over_the_baseline(project) -> None:
    project.write(TEST)
    project.run("--vram-baseline=vram.json", "--vram-update-baseline")
    project.write(TEST.replace("alloc(2 * MB)", "alloc(2 * MB + MB // 2)"))
    project.run("--vram-baseline=vram.json", "--vram-output=r.html", "--vram-output=r.json")
    page = (project.pytester.path / "r.html").read_text(encoding="utf-8")
    assert "<b>1 test needs over 2% more</b> than in vram.json" in page
    report = json.loads((project.pytester.path / "r.json").read_text())
    assert report["baseline"] == {"source": "vram.json", "tolerance_percent": 2.0}
    assert report["tests"][0]["measurements"][0]["baseline_bytes"] == 2 * 2**20
