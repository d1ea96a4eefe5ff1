from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vram import baseline, cli
from pytest_vram.memory import (
    Budget,
    Device,
    Holder,
    HostPeak,
    Measurement,
    Peak,
    Report,
    Series,
    TestRecord,
    Timeline,
    Within,
    Work,
)
from pytest_vram.memory.timeline import CATEGORIES
from pytest_vram.report import files
from pytest_vram.report.html import data, render
from pytest_vram.report.html import page as html_page

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "golden"))
import sample


def embedded(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def test_names_with_markup_stay_text() -> None:
    page = render(sample.report())
    assert "<script>alert" not in page
    assert html.escape(sample.report().tests[0].nodeid) in page
    assert page.count("<script") == 2


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
def test_no_text_of_a_report_ends_the_data(text: str) -> None:
    test = sample.report().tests[0]
    (measurement,) = test.measurements
    nasty = text + "</script><!--<script>"
    measurement = replace(measurement, holders=(Holder(size_bytes=1, count=1, location=nasty),))
    page = render(replace(sample.report(), tests=(replace(test, measurements=(measurement,), worst_example=nasty),)))
    assert page.count("</script>") == 2
    assert nasty in embedded(page)["strings"]
    assert embedded(page)["tests"][0]["example"] == nasty


def test_nothing_runs_but_the_pages_own_script_and_nothing_is_fetched() -> None:
    page = render(sample.report())
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    assert "default-src 'none'" in policy[1]
    for tag in ("style", "script"):
        text = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert len(text) == 1
        digest = base64.b64encode(hashlib.sha256(text[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]
    outside = [url for url in re.findall(r"https?://[^\s\"'<)]+", page) if url != "http://www.w3.org/2000/svg"]
    assert outside == []
    assert not re.search(r'\s(style|on\w+)="', page)


def test_the_table_needs_no_script() -> None:
    page = render(sample.report()).partition("<script")[0]
    for words in ("14.0 GiB", "12.0 GiB", "117%", "test_leaks", "3.00 MiB", "llama", "model.py:77", "torch 2.14.1"):
        assert words in page
    assert page.count('<th scope="row">') == 6


def test_a_thousand_tests_take_less_than_two_megabytes() -> None:
    size = 242
    rising = tuple(range(0, size * 2**20, 2**20))
    series = tuple(Series(name=f"model.layers.*.part_{i}", sizes=rising) for i in range(9))
    timeline = Timeline(
        times=tuple(i / 10 for i in range(size)),
        allocated=tuple(9 * v for v in rising),
        reserved=rising,
        categories=series,
        modules=series[:8],
        peak_index=size - 1,
        events=99_999,
    )
    (measurement,) = sample.report().tests[0].measurements

    def test(i: int) -> Any:
        holders = tuple(
            Holder(size_bytes=2**28 + i, count=3, location=f"package/module_{k}.py:{i} in forward_{k}")
            for k in range(30)
        )
        changed = replace(measurement, timeline=timeline, holders=holders)
        name = f"tests/some/folder/test_file.py::TestClass::test_name_of_a_test[{i}-some-parameter]"
        return replace(sample.report().tests[0], nodeid=name, measurements=(changed,))

    page = render(replace(sample.report(), tests=tuple(map(test, range(1000)))))
    assert len(page.encode()) < 2_000_000
    assert len(embedded(page)["tests"][0]["timeline"]["allocated"]) > 2 * 200


def test_thinning_keeps_first_last_and_peak() -> None:
    timeline = Timeline(
        times=tuple(float(i) for i in range(1000)),
        allocated=tuple(5 if i != 777 else 9 for i in range(1000)),
        peak_index=777,
    )
    chosen = data.thinned(timeline, 20)
    assert len(chosen) <= 20
    assert {0, 777, 999} <= set(chosen)
    assert data.thinned(timeline, 1000) == list(range(1000))


@given(st.lists(st.integers(0, 2**45), max_size=50))
def test_packed_values_are_right_to_a_four_thousandth(values: list[int]) -> None:
    top = max(values, default=0)
    packed = data.pack(values, top)
    digits = data._DIGITS
    back = [
        (digits.index(a) * 64 + digits.index(b)) * top / 4095 for a, b in zip(packed[::2], packed[1::2], strict=True)
    ]
    assert all(abs(a - b) <= top / 8190 + 1 for a, b in zip(back, values, strict=True))


def test_a_comparison_says_what_grew_by_category_and_line() -> None:
    now = sample.report()
    (m,) = now.tests[0].measurements
    assert m.timeline
    smaller = tuple(
        replace(s, sizes=tuple(size // 2 for size in s.sizes)) if s.name == "activations" else s
        for s in m.timeline.categories
    )
    old_m = replace(
        m,
        peak=Peak(allocated_bytes=9 * 2**30),
        holders=tuple(replace(h, size_bytes=h.size_bytes // 2) for h in m.holders),
        timeline=replace(m.timeline, categories=smaller),
    )
    before = replace(now, tests=(replace(now.tests[0], measurements=(old_m,)), *now.tests[1:-1]))
    found = embedded(render(now, before))["tests"][0]["before"]
    assert found["categories"][0] == ["activations", 9 * 2**30 // 2, 9 * 2**30]
    assert found["lines"][0] == ["model.py:41 in forward", 9 * 2**29, 9 * 2**30]
    held = baseline.held_against(now, baseline.peaks(before, failed=True), source="old.json", tolerance=2)
    page = render(held, before)
    assert '<span class="soft">new</span>' in page
    assert "+5.00 GiB" in page
    assert embedded(page)["tests"][0]["baseline"] == 9 * 2**30
    gone = replace(before, tests=(*before.tests, replace(now.tests[0], nodeid="test_gone")))
    assert "Gone since the earlier run" in render(held, gone)


def test_what_grew_over_the_baseline_is_in_plain_sight_without_a_script() -> None:
    report = sample.report()
    peaks = baseline.peaks(report, failed=True)
    (card,) = peaks[report.tests[0].nodeid]
    peaks[report.tests[0].nodeid][card] //= 2
    page = render(baseline.held_against(report, peaks, source="vram.json", tolerance=2)).partition("<script")[0]
    assert "<b>1 test needs over 2% more</b> than in vram.json" in page
    assert '<b class="grew">+7.00 GiB</b> <a href="#t0">' in page
    assert '<td class="n w">7.00 GiB</td><td class="n"><span class="grew">+7.00 GiB</span></td>' in page
    assert '#tests td.w:nth-child(3)::before{content:"Before "}' in page
    nothing = render(baseline.held_against(report, {}, source="<b>", tolerance=2))
    assert "No test has an entry in &lt;b&gt;." in nothing
    assert "Before" not in render(report)


def test_segments_are_a_table_without_a_script() -> None:
    page = render(sample.report())
    (table,) = re.findall(r"<h3>Segments at the peak</h3>(.*?)</noscript>", page, re.DOTALL)
    for words in ("2.00 MiB", "large, expandable", "model.py:41 in forward", "604 MiB", "100"):
        assert words in table
    assert "Reserved, and not in use" in page
    test = embedded(page)["tests"][0]
    assert [segment[1] for segment in test["layout"]["segments"]] == [1, 1, 1, 100]
    assert sum(row[2] for row in test["layout"]["rows"]) == 103


def test_drawings_get_what_room_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    test = sample.report().tests[0]
    report = replace(sample.report(), tests=tuple(replace(test, nodeid=f"t{i}") for i in range(3)))
    alone = data._size(data.page_data(report)["tests"][0]["layout"]["segments"])
    for layout in (found["layout"] for found in data.page_data(report)["tests"]):
        assert "segments" in layout
    rest = sum(data._size(found) for found in data.page_data(report)["tests"]) - 3 * alone
    monkeypatch.setattr(data, "PAGE_BYTES", rest + 3 * data.ROW_BYTES + int(1.5 * alone))
    assert ["segments" in found["layout"] for found in data.page_data(report)["tests"]] == [True, False, False]


def test_a_probe_that_knows_the_card_alone_is_shown_with_that() -> None:
    card = Device(kind="nvml", index=0, name="NVIDIA L4", total_bytes=2**34)
    seen = Measurement(device=card, peak=Peak(device_bytes=3 * 2**30))
    found = embedded(
        render(replace(sample.report(), tests=(TestRecord(nodeid="t", outcome="passed", measurements=(seen,)),)))
    )
    assert (found["tests"][0]["peak"], found["tests"][0]["metric"]) == (3 * 2**30, "device")


def test_an_empty_report_is_a_page() -> None:
    page = render(Report(environment=sample.environment(), tests=()))
    assert "<b>0</b> tests" in page
    assert "No test was measured." in page


def test_the_command_line_writes_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = tmp_path / "a.json"
    files.save(sample.report(), a)
    assert cli.main(["report", str(a), "-o", str(tmp_path / "a.html")]) == 0
    assert (tmp_path / "a.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert cli.main(["compare", str(a), str(a), "-o", str(tmp_path / "c.html")]) == 0
    assert "No test grew by more than 2% over a.json: 5 compared" in (tmp_path / "c.html").read_text(encoding="utf-8")
    assert cli.main(["compare", str(a), str(a), "-o", str(tmp_path / "c.md")]) == 2
    assert "name it c.html" in capsys.readouterr().err


def luminance(color: str) -> float:
    """Relative luminance of ``#rgb`` or ``#rrggbb``: WCAG 2.2."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_categories_stand_out_from_what_is_behind_them(theme: int) -> None:
    style = Path(html_page.__file__).with_name("style.css").read_text(encoding="utf-8")
    colors: dict[str, str] = {}
    for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)[: theme + 1]:
        colors |= dict(re.findall(r"--([\w-]+): (#\w+)", block))
    light_on = set(re.findall(r"\.t-(\w+)", style))
    for behind in ("paper", "shade", "bad-shade"):
        for text in ("ink", "soft", "link", "bad", "good", "odd"):
            assert contrast(colors[text], colors[behind]) >= 4.5, (text, behind)
    for name in CATEGORIES:
        written = colors["on-dark" if name in light_on else "on-mid"]
        assert contrast(written, colors[name]) >= 4.5, name
        assert min(contrast(colors[name], colors[behind]) for behind in ("paper", "shade")) >= 3, name


def test_host_memory_and_work_are_in_the_data() -> None:
    (_, within, *_) = sample.report().tests
    work = Work(
        launches=1204,
        synchronizations=2,
        copies_to_device=1,
        copied_to_device_bytes=4096,
        copies_to_host=3,
        copied_to_host_bytes=24,
        copies_on_device=1200,
        copied_on_device_bytes=2**20,
    )
    asked = replace(within, measurements=(replace(within.measurements[0], work=work),))
    host = HostPeak(limit_bytes=2**30, peak_bytes=3 * 2**30, own_bytes=3 * 2**30)
    bare = TestRecord(nodeid="t", outcome="failed", host=host)
    unknown = TestRecord(nodeid="u", outcome="passed", host=HostPeak(limit_bytes=1, missing="no /proc"))
    page = render(replace(sample.report(), tests=(asked, bare, unknown)))
    first, second, third = embedded(page)["tests"]
    assert first["work"] == (
        "1,204 kernels, 2 waits, 4.00 KiB to the device in 1 copy, 24 B to the host in 3 copies,"
        " 1.00 MiB on the device in 1,200 copies"
    )
    assert "host" not in first
    assert second["host"][0] == "3.00 GiB of 1.00 GiB, 2.00 GiB over"
    assert second["host"][1].startswith("this process  3.00 GiB (the kernel's maximum)")
    assert third["host"] == ["not measured: no /proc"]


def test_of_several_devices_the_page_says_which_one_it_shows_and_lists_all() -> None:
    """Ranks reserve alike and hold unlike: the one with the most in live tensors is shown."""

    def measured(index: int, allocated: int, device: int) -> Measurement:
        card = Device(kind="dry", index=index, name="NVIDIA L4", total_bytes=2**34)
        peak = Peak(allocated_bytes=allocated, reserved_bytes=allocated + 1, device_bytes=device)
        return Measurement(device=card, peak=peak, work=Work(launches=index))

    budget = Budget(limit_bytes=2**34, metric="device", origin="card")
    verdict = Within(headroom_bytes=2**34 - 900)
    ranks = tuple(measured(index, *sizes) for index, sizes in enumerate([(700, 800), (500, 900), (600, 900)]))
    several = TestRecord(nodeid="t", outcome="passed", budget=budget, measurements=ranks, verdict=verdict)
    one = replace(several, nodeid="u", measurements=ranks[:1])
    first, second = embedded(render(replace(sample.report(), tests=(several, one))))["tests"]
    assert first["index"] == "2"
    assert first["figures"] == [600, 601, 900]
    assert first["devices"][1:] == [
        [1, "NVIDIA L4", 500, 501, 900, "1 kernel, 0 waits"],
        [2, "NVIDIA L4", 600, 601, 900, "2 kernels, 0 waits"],
    ]
    assert "devices" not in second
    assert "index" not in second
