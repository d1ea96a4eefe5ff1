"""Budgets of host memory: real processes and real pages, beside a device that is made up."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

PRELUDE = """
import mmap, os, subprocess, sys, time

def touch(mebibytes):
    block = mmap.mmap(-1, mebibytes * MB)
    for page in range(0, len(block), 4096):
        block[page] = 1
    return block

CHILD = "import mmap, sys\\nb = mmap.mmap(-1, int(sys.argv[1]) * 2**20, flags=mmap.MAP_PRIVATE)\\n" \\
        "for page in range(0, len(b), 4096): b[page] = 1\\nprint(1, flush=True); sys.stdin.read()"

def child(mebibytes):
    process = subprocess.Popen([sys.executable, "-S", "-c", CHILD, str(mebibytes)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    process.stdout.readline()
    return process

def end(process):
    process.communicate()
"""
TESTS = """
EARLIER = touch(100)  # what was there before does not count

@pytest.fixture
def loaded():
    yield touch(40)

@pytest.mark.vram(max_host_gb=0.1)
def test_within(): touch(60)

@pytest.mark.vram(max_host_gb=0.05)
def test_spike():
    block = touch(80)
    del block

@pytest.mark.vram(max_host_gb=0.05)
def test_fixtures_count(loaded): touch(30)

@pytest.mark.vram(max_host_gb=0.05)
def test_children_count():
    process = child(80)
    time.sleep(1.5)
    end(process)

@pytest.mark.vram(max_host_gb=0.05)
def test_a_forked_child_holds_nothing_of_its_own():
    pid = os.fork()
    if not pid:
        time.sleep(0.3)
        os._exit(0)
    os.waitpid(pid, 0)

@pytest.mark.vram(max_host_gb=0.05, max_mb=1)
def test_both(): touch(80); alloc(MB // 2)

@pytest.mark.vram(max_host_gb=0.05)
def test_own_error():
    touch(10)
    raise RuntimeError("its own")

@pytest.mark.vram(max_mb=1)
def test_without(): alloc(MB // 2)
"""
MIB = 2**20


@pytest.mark.parametrize("how", ["alone", "xdist"])
def test_a_budget_of_host_memory_is_held(project: Any, how: str) -> None:
    project.write(PRELUDE + TESTS)
    arguments = ("-n", "1", "--dist", "load") if how == "xdist" else ()
    plugins = ("xdist",) if how == "xdist" else ()
    result = project.run(
        "--vram-gpu=host",
        "--vram-report",
        "--vram-output=r.json",
        "--vram-output=r.md",
        "--vram-output=r.csv",
        *arguments,
        plugins=plugins,
    )
    text = result.stdout.str()
    result.assert_outcomes(passed=3, failed=5)
    data = json.loads((project.pytester.path / "r.json").read_text())
    tests = {test["nodeid"].partition("::")[2]: test for test in data["tests"]}
    sizes = {name: test["host"]["peak_bytes"] / MIB for name, test in tests.items() if "host" in test}
    slack = 6  # pytest's own objects; the kernel's counters are exact to some pages of each processor
    assert set(tests) - set(sizes) == {"test_without"}
    assert 59 < sizes["test_within"] < 60 + slack
    assert 79 < sizes["test_spike"] < 80 + slack
    assert 69 < sizes["test_fixtures_count"] < 70 + slack
    assert 79 < sizes["test_children_count"] < 80 + 4 * slack  # with the interpreter of the child
    assert sizes["test_a_forked_child_holds_nothing_of_its_own"] < 2 * slack
    assert {name for name, test in tests.items() if test["outcome"] == "failed"} == {
        "test_spike",
        "test_fixtures_count",
        "test_children_count",
        "test_both",
        "test_own_error",
    }
    assert tests["test_both"]["verdict"]["verdict"] == "within"  # that of the device
    assert not tests["test_spike"]["host"].get("sampled", False)
    assert tests["test_children_count"]["host"]["children"] == 1
    assert re.search(r"the test needed [78]\d\.\d MiB of host memory, ", text)
    assert "(max_host_gb at test_it.py:" in text
    assert "RuntimeError: its own" in text
    assert "try: fewer worker processes" in text
    assert "try: load one file of the checkpoint at a time" in text
    assert "host memory:" in text
    page = (project.pytester.path / "r.md").read_text()
    assert "Host memory:" in page
    assert "of host memory over its budget</summary>" in page
    header = (project.pytester.path / "r.csv").read_text().splitlines()[0].split(",")
    assert {"host_bytes", "host_budget_bytes", "host_pinned_bytes"} <= set(header)
    assert "host" not in header


def test_where_there_is_no_proc_it_is_said(project: Any) -> None:
    project.write(
        """
@pytest.mark.vram(max_host_gb=1)
def test_host(): pass

@pytest.mark.vram(max_host_gb=1, max_mb=1)
def test_both(): alloc(MB // 2)
"""
    )
    project.conftest(
        "import sys\nfrom pytest_vram.probe import host_memory\nhost_memory.sys = type('S', (), "
        "{'platform': 'darwin', 'modules': sys.modules})\n"
    )
    result = project.run("-rs", "--vram-gpu=host")
    result.assert_outcomes(passed=1, skipped=1)
    assert "2 budgets of host memory were not measured: host memory is read from /proc" in result.stdout.str()
    assert "this is darwin" in result.stdout.str()
    project.ini("vram_on_unmeasured = fail")
    project.run("--vram-gpu=host").assert_outcomes(failed=2)


def test_host_memory_needs_no_device(project: Any) -> None:
    project.write(
        """
@pytest.mark.vram(max_host_gb=0.05)
def test_much(): held = bytearray(80 * MB)

@pytest.mark.vram(max_host_gb=0.05)
def test_little(): held = bytearray(8 * MB)
"""
    )
    project.pytester.makeconftest("")
    tests = project.report("--vram-gpu=off")
    assert {name: test["outcome"] for name, test in tests.items()} == {"test_much": "failed", "test_little": "passed"}


def test_a_limit_that_is_none_is_refused(project: Any) -> None:
    values = ("'2'", "0", "-1", "float('inf')")
    project.write(
        "\n".join(
            f"@pytest.mark.vram(max_host_gb={value})\ndef test_{number}(): pass" for number, value in enumerate(values)
        )
    )
    result = project.run("--vram-gpu=host")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    text = result.stderr.str()
    assert [f"test_{number}: max_host_gb=" in text for number in range(len(values))] == [True] * len(values)
