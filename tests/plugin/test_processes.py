"""Processes below a test: each leaves figures, and the test's budget counts them.

Here the figures are written by hand, so that they can be met to the byte; who writes them in earnest is tested on a
dry GPU, in e2e.
"""

from __future__ import annotations

from typing import Any

import pytest

CHILD = """
import os, subprocess, sys
from pathlib import Path
from pytest_vram.memory import Device, Holder, Measurement, Peak, Process
from pytest_vram.probe import reporter

def child(*sizes, rank=None, pid=None, card=0, began=None, ended="now", **more):
    '''As if a process with these peaks, one a device, had run now.'''
    folder = Path(os.environ["PYTEST_VRAM_PROCESSES"])
    measurements = tuple(
        Measurement(
            device=Device(kind="cuda", index=card + index, name="Made-up 9000"),
            peak=Peak(allocated_bytes=size, reserved_bytes=2 * size),
            holders=(Holder(size_bytes=size, count=1, location="worker.py:7 in work"),),
        )
        for index, size in enumerate(sizes)
    )
    pid = pid or 10_000_000 + len(list(folder.glob("*.json")))
    began = reporter.now() if began is None else began
    ended = reporter.now() if ended == "now" else ended
    process = Process(pid=pid, name="python worker.py", began=began, ended=ended, rank=rank,
                      measurements=measurements, **more)
    reporter.write_figures(folder, process)
"""


@pytest.fixture
def family(project: Any) -> Any:
    project.pytester.makepyfile(family=CHILD)
    write = project.write
    project.write = lambda source: write("from family import *\n" + source)
    return project


def outcomes(family: Any, *arguments: str) -> tuple[pytest.RunResult, dict[str, str]]:
    result = family.run("-rA", *arguments)
    found = {}
    for line in result.outlines:
        word, _, rest = line.partition(" ")
        if word in ("PASSED", "FAILED", "SKIPPED", "ERROR") and "::" in rest:
            found[rest.partition("::")[2].split(" ")[0]] = word
    return result, found


def test_a_childs_memory_counts(family: Any) -> None:
    family.write("""
@pytest.mark.vram(max_mb=4)
def test_at_the_limit(): child(4 * MB)

@pytest.mark.vram(max_mb=4)
def test_above_it(): child(4 * MB + 1)

@pytest.mark.vram(max_mb=4)
def test_the_child_of_an_earlier_test_is_not_mine():
    child(1 * MB)

@pytest.mark.vram(max_mb=4)
def test_together_with_the_parent():
    held = alloc(3 * MB)
    child(2 * MB)
""")
    result, found = outcomes(family)
    assert found == {
        "test_at_the_limit": "PASSED",
        "test_above_it": "FAILED",
        "test_the_child_of_an_earlier_test_is_not_mine": "PASSED",
        "test_together_with_the_parent": "FAILED",
    }
    text = result.stdout.str()
    assert "the test needed 5.00 MiB of allocated memory, 1.00 MiB more" in text
    assert "python worker.py (PID 10000001)" in text
    assert "worker.py:7 in work" in text
    assert "never touched the device" not in text


def test_peaks_add_up_only_where_processes_share_a_card_at_the_same_time(family: Any) -> None:
    family.write("""
def long(size, **more):  # both are there until now
    child(size, began=reporter.now() - 0.001, **more)

@pytest.mark.vram(max_mb=4)
def test_one_after_the_other(): child(3 * MB); child(3 * MB)

@pytest.mark.vram(max_mb=4)
def test_at_the_same_time():
    now = reporter.now()
    child(3 * MB, began=now, ended=now + 9, rank=0)
    child(3 * MB, began=now + 1, ended=now + 9, rank=1)

@pytest.mark.vram(max_mb=4)
def test_a_card_each():
    now = reporter.now()
    child(3 * MB, began=now, ended=now + 9, rank=0)
    child(3 * MB, began=now, ended=now + 9, rank=1, card=1)

@pytest.mark.vram(max_mb=4, ranks="each")
def test_each_by_itself():
    now = reporter.now()
    child(3 * MB, began=now, ended=now + 9, rank=0)
    child(3 * MB, began=now + 1, ended=now + 9, rank=1)

@pytest.mark.vram(max_mb=4, ranks="each")
def test_the_one_that_is_too_large_is_named():
    now = reporter.now()
    child(3 * MB, began=now, ended=now + 9, rank=0)
    child(5 * MB, began=now + 1, ended=now + 9, rank=1, card=1)

@pytest.mark.vram(max_mb=4, device=0)
def test_of_one_device_only(): child(5 * MB, card=1)
""")
    result, found = outcomes(family)
    assert {name for name, how in found.items() if how == "FAILED"} == {
        "test_at_the_same_time",
        "test_the_one_that_is_too_large_is_named",
    }, result.stdout.str()
    text = result.stdout.str()
    assert "rank 0 (PID 10000002), the largest of 2 processes on the card" in text
    assert "process rank 1 (PID 10000009)" in text
    assert "the largest rank needs 25.0% more than the mean of the ranks" in text


def test_a_process_without_figures_is_never_a_pass(family: Any) -> None:
    family.write("""
@pytest.mark.vram(max_mb=4)
def test_killed(): child(missing="it used the GPU and ended without leaving its figures")

@pytest.mark.vram(max_mb=4)
def test_killed_beside_one_that_is_too_large():
    child(missing="it used the GPU and ended")
    child(5 * MB)

@pytest.mark.vram(max_mb=4)
def test_touched_and_not_reported():
    '''As a process leaves it that os._exit ends.'''
    Path(os.environ["PYTEST_VRAM_PROCESSES"], "99999999.began").write_text(
        '{"pid": 99999999, "name": "python lost.py", "began": %r, "rank": 3}' % reporter.now())

def test_phase(vram):
    with vram.measure("lost", max_mb=4):
        child(missing="it used the GPU and ended")

@pytest.mark.vram(max_mb=4)
def test_phase_of_a_budgeted_test(vram):
    with vram.measure("lost", max_mb=3):
        child(4 * MB)
""")
    result, found = outcomes(family)
    failed = {name for name, how in found.items() if how == "FAILED"}
    assert failed == {"test_killed_beside_one_that_is_too_large", "test_phase_of_a_budgeted_test"}
    assert "3 skipped" in result.stdout.str()
    assert "PASSED" not in found.values()
    text = result.stdout.str()
    assert "the figures of python worker.py (PID 10000000) are missing" in text
    assert "rank 3 (PID 99999999)" in text
    assert "it was killed, or ended by os._exit" in text
    assert "phase 'lost' needed 4.00 MiB" in text
    family.ini("vram_on_unmeasured = fail")
    _, found = outcomes(family)
    assert set(found.values()) == {"FAILED"}


def test_a_server_counts_for_the_tests_that_use_its_fixture(family: Any) -> None:
    family.write("""
@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    child(3 * MB, pid=process.pid, began=reporter.started(process.pid), ended=None)
    yield
    process.communicate(b"\\n")

@pytest.mark.vram(max_mb=2)
def test_first(server): pass

@pytest.mark.vram(max_mb=2)
def test_second(server): pass

@pytest.mark.vram(max_mb=2)
def test_without(): alloc(1 * MB)

@pytest.mark.vram(max_mb=2, scope="call")
def test_call(server): alloc(1 * MB)
""")
    result, found = outcomes(family)
    assert {name for name, how in found.items() if how == "FAILED"} == {"test_first", "test_second"}, (
        result.stdout.str()
    )


def test_processes_left_behind_are_named(family: Any) -> None:
    family.write("""
def leave(**more):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    kept.append(process)
    Path(os.environ["PYTEST_VRAM_PROCESSES"], f"{process.pid}.live").write_bytes(
        b"vramdry1" + (1).to_bytes(8, "little") + b"".join(n.to_bytes(8, "little") for n in (3 * MB, 3 * MB, 0)))
    child(3 * MB, pid=process.pid, began=reporter.started(process.pid), ended=None)
    return process

kept = []

@pytest.mark.vram(max_mb=4)
def test_leaves(): leave()

@pytest.mark.vram(max_mb=4, max_leak_mb=1)
def test_may_not(): leave()

@pytest.mark.vram(max_mb=4, max_leak_mb=1)
def test_ends_it():
    process = leave()
    process.kill()
    process.wait()

def test_at_last():
    for process in kept:
        process.kill()
""")
    result, found = outcomes(family)
    text = result.stdout.str()
    assert found["test_leaves"] == found["test_ends_it"] == "PASSED", text
    assert found["test_may_not"] == "ERROR"
    assert "test_leaves left a process running: python worker.py (PID " in text
    assert "holds 3.00 MiB" in text
    assert "processes running that hold 3.00 MiB (3,145,728 bytes), and its limit is 1.00 MiB (max_leak_mb)" in text
    assert text.count("left a process running") == 2


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("vram_ranks()", "vram_ranks(): write the number of ranks"),
        ("vram_ranks(0)", "vram_ranks(0): write the number of ranks, as in vram_ranks(4); 1 to 64 are possible"),
        ("vram_ranks('2')", "vram_ranks('2'): write the number of ranks"),
        ("vram_ranks(2, timeout=-1)", "vram_ranks(timeout=-1): write seconds above 0"),
        ("vram_ranks(2, ranks=3)", "vram_ranks() has no argument 'ranks'"),
        ("vram(max_mb=1, ranks='sum')", "ranks='sum': choose 'card', 'each'"),
    ],
)
def test_a_marker_that_cannot_be_is_told_at_collection(project: Any, marker: str, message: str) -> None:
    project.write(f"@pytest.mark.{marker}\ndef test_it(): pass")
    result = project.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in result.stderr.str() + result.stdout.str()


def test_ranks_of_a_unittest_are_refused(project: Any) -> None:
    project.write("""
import unittest

@pytest.mark.vram_ranks(2)
class TestIt(unittest.TestCase):
    def test_it(self): pass
""")
    result = project.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "vram_ranks works on test functions and methods" in result.stderr.str() + result.stdout.str()
