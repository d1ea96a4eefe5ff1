"""The HTML report in a real browser: Chromium, headless (Debian's packages chromium and chromium-driver)."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram import baseline
from pytest_vram.memory import Budget, Device, HostPeak, Measurement, Note, Peak, ProcessPeak, TestRecord, Within, Work
from pytest_vram.report.html import render
from pytest_vram.units import format_bytes

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "golden"))
import sample

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_vram.memory import Report

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install 'pytest-vram[test]'")
Wait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")

DESKTOP, PHONE = (1300, 900), (390, 844)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    report = sample.report()
    (folder / "report.html").write_text(render(report), encoding="utf-8")
    (measured,) = report.tests[0].measurements
    smaller = replace(measured, peak=replace(measured.peak, allocated_bytes=2**30))
    before = replace(report, tests=(replace(report.tests[0], measurements=(smaller,)), *report.tests[1:]))
    peaks = baseline.peaks(before, failed=True)
    held = baseline.held_against(report, peaks, source="before.json", tolerance=2)
    (folder / "compared.html").write_text(render(held, before), encoding="utf-8")
    few = replace(report, tests=(replace(report.tests[0], measurements=(_nvml(),)),))
    (folder / "nvml.html").write_text(render(few), encoding="utf-8")
    (folder / "empty.html").write_text(render(replace(report, tests=())), encoding="utf-8")
    return folder


def _nvml() -> Measurement:
    card = Device(kind="nvml", index=0, name="NVIDIA L4", total_bytes=2**34)
    return Measurement(device=card, peak=Peak(device_bytes=3 * 2**30))


def look(browser: Any, page: Path, size: tuple[int, int] = DESKTOP, *, dark: bool = False) -> None:
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get_log("browser"), browser.get_log("performance")
    browser.get("about:blank")
    browser.get(page.as_uri())


def rows(browser: Any) -> list[str]:
    script = "return [...document.querySelectorAll('#tests tbody tr[id]')].filter(r => !r.hidden).map(r => r.id)"
    return list(browser.execute_script(script))


def find(browser: Any, selector: str) -> Any:
    """The first element that fits, waited for: a link within the page is followed after its click has returned."""
    wait = Wait(browser, timeout=30, poll_frequency=0.05)
    return wait.until(lambda page: page.find_element("css selector", selector))


def quiet(browser: Any) -> bool:
    """No error on the console, and no request but for the page itself."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    away = [url for url in urls if not url.startswith(("file:", "about:"))]
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == [] and away == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_test_opens_and_shows_where_its_memory_went(browser: Any, pages: Path, size: Any, dark: bool) -> None:
    look(browser, pages / "report.html", size, dark=dark)
    find(browser, "#t0 a").click()
    inside = find(browser, "tr.detail")
    for words in (
        "Memory over time",
        "activations 9.00 GiB",
        "Who holds the peak",
        "model.py:41 in forward",
        "backward",
    ):
        assert words in inside.text
    for words in ("Segments at the peak", "103 segments", "lost to fragmentation", "large blocks: 3 segments"):
        assert words in inside.text
    assert "worst example shape=(batch=3, seq=2048)" in inside.text.replace("\n", " ")
    assert len(browser.find_elements("css selector", "tr.detail svg.chart")) == 3
    wide = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") != dark
    find(browser, "#t0 a").click()
    assert browser.find_elements("css selector", "tr.detail") == []
    assert quiet(browser)


def test_an_open_test_follows_the_width_of_its_frame(browser: Any, pages: Path) -> None:
    """A frame of a notebook may get its width after the page was drawn, and the window's size does not tell of it."""
    look(browser, pages / "report.html")
    find(browser, "#t0 a").click()
    find(browser, "tr.detail .inside")
    wide = "return document.querySelector('tr.detail .inside').offsetWidth"
    for narrow in (True, False):
        browser.execute_script(f"document.body.style.width = '{500 if narrow else 1200}px'")
        Wait(browser, timeout=30, poll_frequency=0.05).until(
            lambda page, narrow=narrow: (page.execute_script(wide) < 600) == narrow
        )
    assert quiet(browser)


def test_a_name_with_markup_stays_text(browser: Any, pages: Path) -> None:
    look(browser, pages / "report.html")
    assert "<script>alert(1)</script>" in find(browser, "#t0 a").text
    assert browser.execute_script("return document.scripts.length") == 2
    assert quiet(browser)


def test_columns_sort_both_ways(browser: Any, pages: Path) -> None:
    look(browser, pages / "report.html")
    first = rows(browser)
    head = find(browser, "th[data-key=name] button")
    head.click()
    by_name = rows(browser)
    names = [find(browser, f"#{row} a").text for row in by_name]
    assert names == sorted(names)
    head.click()
    assert rows(browser) == by_name[::-1]
    find(browser, "th[data-key=peak] button").click()
    assert rows(browser) == first
    assert find(browser, "th[data-key=peak]").get_attribute("aria-sort") == "descending"
    assert quiet(browser)


def test_the_filter_takes_words_and_verdicts(browser: Any, pages: Path) -> None:
    look(browser, pages / "report.html")
    find(browser, "#find").send_keys("train leaks")
    assert [find(browser, f"#{row} a").text for row in rows(browser)] == ["tests/test_train.py::test_leaks"]
    assert find(browser, "#shown").text == "1 of 6"
    find(browser, "#find").clear()
    find(browser, "#show option[value=unmeasured]").click()
    assert [find(browser, f"#{row} a").text for row in rows(browser)] == ["tests/test_train.py::test_nothing_there"]
    find(browser, "#show option[value=failed]").click()
    assert len(rows(browser)) == 3
    assert quiet(browser)


def test_modules_can_be_seen_instead_of_categories(browser: Any, pages: Path) -> None:
    look(browser, pages / "report.html")
    find(browser, "#t0 a").click()
    find(browser, "button[value=modules]").click()
    assert "model.layers.0" in find(browser, ".legend").text
    assert find(browser, "button[value=modules]").get_attribute("aria-pressed") == "true"
    assert quiet(browser)


def test_a_link_opens_its_test(browser: Any, pages: Path) -> None:
    look(browser, pages / "report.html")
    browser.get(f"{(pages / 'report.html').as_uri()}#t0")
    assert "Memory over time" in find(browser, "tr.detail").text


def test_a_block_says_whose_it_is_to_mouse_and_keys(browser: Any, pages: Path) -> None:
    look(browser, pages / "report.html")
    find(browser, "#t0 a").click()
    chart = find(browser, "svg.map")
    said = browser.execute_script("return arguments[0].nextElementSibling", chart)
    chart.send_keys(Keys.ARROW_RIGHT)
    assert said.text == "5.00 GiB of a segment of 9.61 GiB: activations in 32 blocks, model.py:41 in forward"
    pieces = browser.execute_script("return arguments[0].querySelector('.s-pending').getBBox().width", chart)
    assert pieces > 0
    box = chart.rect
    actions = webdriver.ActionChains(browser)
    actions.move_to_element_with_offset(chart, 30 - box["width"] / 2, 26 - box["height"] / 2).perform()
    assert said.text.startswith("5.00 GiB")
    assert "small blocks, up to 1 MiB: 100 segments, 200 MiB" in chart.text
    assert quiet(browser)


def test_segments_and_holders_are_tables_without_a_script(browser: Any, pages: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        look(browser, pages / "report.html", PHONE)
        shown = find(browser, "noscript").text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    for words in ("Segments at the peak", "large, expandable", "Who holds the peak", "model.py:41 in forward"):
        assert words in shown


def test_a_comparison_shows_what_grew(browser: Any, pages: Path) -> None:
    look(browser, pages / "compared.html")
    assert "1 test needs over 2% more than in before.json" in find(browser, ".notice").text
    find(browser, ".notice a").click()
    inside = find(browser, "tr.detail")
    assert "Since before.json" in inside.text
    assert find(browser, "tr.detail .grew").text != ""
    assert "+13.0 GiB" in inside.text
    find(browser, "th[data-key=change] button").click()
    assert rows(browser)[0] == "t0"
    find(browser, "#show option[value=regressed]").click()
    assert rows(browser) == ["t0"]
    assert "+13.0 GiB" in find(browser, "#t0").text
    assert quiet(browser)


def test_a_page_says_why_there_is_no_record_over_time(browser: Any, pages: Path) -> None:
    look(browser, pages / "nvml.html")
    assert "NVML knows how much a whole process holds and not what for" in find(browser, "tr.detail").text
    assert not find(browser, "#controls").is_displayed()
    look(browser, pages / "empty.html")
    assert "No test was measured." in find(browser, "body").text
    assert quiet(browser)


def test_a_filter_that_nothing_passes_says_so(browser: Any, pages: Path) -> None:
    look(browser, pages / "report.html")
    find(browser, "#find").send_keys("no such test")
    assert find(browser, "#none").is_displayed()
    assert quiet(browser)


def test_the_page_writes_sizes_as_the_terminal_does(browser: Any, pages: Path) -> None:
    look(browser, pages / "report.html")
    script = files("pytest_vram.report.html").joinpath("chart.js").read_text(encoding="utf-8")
    function = script[script.index("function fixed(") : script.index("// Text is only ever")]
    sizes = [i * 2**17 + j for i in range(0, 20_000, 7) for j in (0, 511)] + [-(2**20), 0, 999, 1000, 2**44 + 2**33]
    assert browser.execute_script(f"{function}; return arguments[0].map(bytes)", sizes) == list(
        map(format_bytes, sizes)
    )


def test_host_memory_and_work_are_shown(browser: Any, tmp_path: Path) -> None:
    """A test without a device has its host memory to show, and not only that nothing was measured."""
    (_, within, *_) = sample.report().tests
    work = Work(launches=1204, synchronizations=2)
    asked = replace(within, measurements=(replace(within.measurements[0], work=work),))
    bare = TestRecord(nodeid="t", outcome="failed", host=HostPeak(limit_bytes=2**30, peak_bytes=3 * 2**30))
    page = tmp_path / "host.html"
    page.write_text(render(replace(sample.report(), tests=(asked, bare))), encoding="utf-8")
    for number, words in (
        (0, ["Asked of the device: 1,204 kernels, 2 waits"]),
        (1, ["No device was measured", "Host memory", "3.00 GiB of 1.00 GiB, 2.00 GiB over"]),
    ):
        look(browser, page)
        find(browser, f"#t{number} a").click()
        shown = find(browser, "tr.detail").text
        assert [word for word in words if word not in shown] == []
    assert quiet(browser)


def test_the_device_that_needs_most_is_named_among_several(browser: Any, tmp_path: Path) -> None:
    (_, within, *_) = sample.report().tests
    (first,) = within.measurements[:1]
    ranks = tuple(
        replace(
            first, device=replace(first.device, index=index), peak=Peak(allocated_bytes=size, device_bytes=2 * size)
        )
        for index, size in enumerate((2**20, 2**21))
    )
    page = tmp_path / "several.html"
    shown = replace(within, measurements=ranks, budget=None, verdict=None)
    page.write_text(render(replace(sample.report(), tests=(shown,))), encoding="utf-8")
    look(browser, page)  # the page of a single test opens it
    text = find(browser, "tr.detail").text
    assert "2.00 MiB allocated on device 1, without a budget" in text
    assert "What stands above is that of device 1, which needs most." in text
    assert quiet(browser)


def _wide(report: Report) -> Report:
    """The report with a test that fills every column: two devices, their work and processes, and bounds of the peak."""
    (_, within, *_) = report.tests
    (first, *_) = within.measurements
    note = Note(name="cuDNN convolutions", text="their workspaces are a guess", source="driver", size_bytes=2**29)
    process = ProcessPeak(pid=4711, rank=1, peak=Peak(allocated_bytes=2**30), start=1.5, end=2.5, ended="exit code 0")
    devices = tuple(
        replace(
            first,
            device=replace(first.device, index=index, kind="dry"),
            peak=Peak(allocated_bytes=2**32, reserved_bytes=2**32, device_bytes=2**32),
            notes=(note,),
            work=Work(launches=1204, synchronizations=2),
            processes=(process,),
        )
        for index in (0, 1)
    )
    budget = Budget(limit_bytes=2**32 + 2**20, metric="reserved")
    wide = replace(
        within,
        nodeid="test_wide.py::test_step",
        measurements=devices,
        budget=budget,
        verdict=Within(headroom_bytes=2**20),
    )
    return replace(report, tests=(*report.tests, wide))


UNREADABLE = """
for (const part of document.querySelectorAll('details')) part.open = true;
const scrolls = (cell) => {
  for (let e = cell; e; e = e.parentElement)
    if (e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX === 'auto') return true;
};
const hidden = (cell) => !cell.checkVisibility() && !cell.closest('noscript');
const beyond = (cell) => cell.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
const cut = (cell) => beyond(cell) && (cell.closest('details') || !scrolls(cell));
return [...document.querySelectorAll('tr:not([hidden]) > td')]
  .filter((cell) => cell.textContent && (hidden(cell) || cut(cell))).map((cell) => cell.textContent);
"""
"""The texts of cells that a narrow screen does not show. The tables below the list of tests must not scroll."""


@pytest.mark.parametrize("size", [(420, 900), PHONE, (320, 640)], ids=str)
def test_a_phone_shows_every_column(browser: Any, tmp_path: Path, size: tuple[int, int]) -> None:
    report = _wide(sample.report())
    peaks = {nodeid: dict.fromkeys(cards, 2**28) for nodeid, cards in baseline.peaks(report, failed=True).items()}
    page = tmp_path / "wide.html"
    page.write_text(render(baseline.held_against(report, peaks, source="before.json", tolerance=2)), encoding="utf-8")
    look(browser, page, size)
    for link in browser.find_elements("css selector", "#tests > tbody > tr > th a"):
        link.click()
        assert browser.execute_script(UNREADABLE) == []
        if "test_wide" in link.text:
            inside = find(browser, "tr.detail").text
            heads = {cell.get_attribute("data-head") for cell in browser.find_elements("css selector", "td[data-head]")}
    for words in ("their workspaces are a guess", "1,204 kernels, 2 waits", "4711", "exit code 0"):
        assert words in inside
    for words in ("if the largest workspace", "only likely", "256 MiB"):
        assert words in find(browser, "body").text
    assert heads >= {"bounds", "verdict", "PID", "asked of it"}
    assert quiet(browser)
