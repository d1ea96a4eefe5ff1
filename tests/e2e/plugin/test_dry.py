"""The plugin on a dry GPU, from the outside: a project of its own, real torch, real allocator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from pathlib import Path

MB = 2**20

PROJECT = """
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn

kept = []

def block(mb):
    return torch.empty(mb << 20, dtype=torch.uint8, device="cuda")

@pytest.fixture(scope="session")
def llama():
    return nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(4)]).cuda()  # 16 MiB

@pytest.mark.vram(max_mb=50)
def test_step(gpu, vram, llama):
    assert (gpu.kind, gpu.name, gpu.computes) == ("dry", "NVIDIA GeForce RTX 4080", False)
    optimizer = torch.optim.AdamW(llama.parameters())
    x = torch.empty(256, 1024, device=gpu.device)
    with vram.measure("forward"):
        loss = llama(x).sum()
    with vram.measure("backward"):
        loss.backward()
    assert vram["backward"].allocated > vram["forward"].allocated
    with vram.measure("step"):
        optimizer.step()
    optimizer.zero_grad()

@pytest.mark.vram(max_mb=4)
def test_at_the_limit():
    block(4)

@pytest.mark.vram(max_mb=4)
def test_one_above_the_limit():
    torch.empty((4 << 20) + 1, dtype=torch.uint8, device="cuda")

@pytest.mark.vram(max_mb=10, enforce=True)
def test_enforced_and_fits_though_segments_are_larger():
    a, b = block(2), block(7)

@pytest.mark.vram(max_mb=100, enforce=True)
def test_enforced():
    a = block(50)
    b = block(90)  # this line

def test_the_cap_is_lifted():
    block(200)

def test_unmarked_keeps():
    kept.append(block(100))

@pytest.mark.vram(max_mb=10)
def test_after_it():
    block(9)

@pytest.mark.vram(max_leak_mb=0)
def test_leaks():
    kept.append(block(4))

@pytest.mark.vram(max_leak_mb=0)
def test_a_workspace_is_no_leak():
    a = torch.empty(128, 128, device="cuda", requires_grad=True)
    (a @ a).sum().backward()

@pytest.mark.vram(max_mb=40)
def test_the_programs_own_resets_lose_nothing():
    block(60)
    torch.cuda.reset_peak_memory_stats()
    block(1)

@pytest.mark.vram(max_mb=8)
@settings(max_examples=20, derandomize=True, database=None, deadline=None)
@given(rows=st.integers(1, 64))
def test_any_batch_fits(rows):
    torch.empty(rows, 1 << 18, dtype=torch.uint8, device="cuda")

@pytest.mark.vram_values
def test_values():
    assert torch.ones(3, device="cuda").sum().item() == 3

@pytest.mark.vram(max_mb=1)
def test_on_the_cpu_only():
    torch.ones(3)

def test_wants_a_value():
    assert torch.ones(3, device="cuda").softmax(0).sum().item() > 0.5  # it is 1

@pytest.mark.vram(max_mb=1)
def test_reads_its_loss():
    torch.ones(3, device="cuda").softmax(0).sum().item()
"""


class Session(NamedTuple):
    out: str
    tests: dict[str, Any]
    junit: dict[str, str]
    notes: dict[str, str]


def session(folder: Path, *arguments: str) -> Session:
    folder.joinpath("test_it.py").write_text(PROJECT)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--vram-gpu=dry:rtx-4080", "--vram-report"]
    command += ["--vram-output=r.json", "--junitxml=r.xml", "-W", "error", *arguments]
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command += ["-p", "vram"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((folder / "r.json").read_text())
    cases = ET.parse(folder / "r.xml").getroot().iter("testcase")
    junit, notes = {}, {}
    for case in cases:
        found = [child for child in case if child.tag in ("failure", "error", "skipped")]
        junit[case.attrib["name"]] = found[0].tag if found else "passed"
        notes[case.attrib["name"]] = (found[0].attrib.get("message", "") + (found[0].text or "")) if found else ""
    return Session(done.stdout, {t["nodeid"].partition("::")[2]: t for t in report["tests"]}, junit, notes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return session(tmp_path_factory.mktemp("alone"))


def allocated(test: dict[str, Any]) -> int:
    measurement = test["measurements"][0]
    return int(measurement["peak"]["allocated_bytes"] - measurement.get("uncounted_bytes", 0))


def test_who_fails_and_who_does_not(alone: Session) -> None:
    assert {name for name, how in alone.junit.items() if how == "failure"} == {
        "test_step",
        "test_one_above_the_limit",
        "test_enforced",
        "test_the_programs_own_resets_lose_nothing",
        "test_any_batch_fits",
        "test_wants_a_value",
    }, alone.out
    assert {name for name, how in alone.junit.items() if how == "error"} == {"test_leaks"}
    assert {name for name, how in alone.junit.items() if how == "skipped"} == {"test_values"}
    assert "1 budget was not measured: the test never touched the device" in alone.out


def test_figures_are_the_allocators(alone: Session) -> None:
    assert allocated(alone.tests["test_at_the_limit"]) == 4 * MB
    assert allocated(alone.tests["test_one_above_the_limit"]) == 4 * MB + 512
    assert allocated(alone.tests["test_unmarked_keeps"]) == 100 * MB
    assert allocated(alone.tests["test_after_it"]) == 9 * MB
    assert allocated(alone.tests["test_the_programs_own_resets_lose_nothing"]) == 60 * MB


def test_the_message_names_fixture_phase_and_line(alone: Session) -> None:
    text = alone.notes["test_step"]
    assert "session fixture `llama` holds 16.0 MiB" in text
    assert "in phase 'step'" in text
    assert "test_it.py:26 in test_step" in text
    assert "dry GPU" in text


def test_a_leak_names_the_line(alone: Session) -> None:
    text = alone.notes["test_leaks"]
    assert "the test left 4.00 MiB (4,194,304 bytes) behind" in text
    assert "4.00 MiB  test_it.py:9 in block" in text
    assert "100 MiB" not in text  # what an earlier test keeps is not this one's


def test_enforce_raises_where_it_breaks_and_says_whose_cap_it_was(alone: Session) -> None:
    text = alone.notes["test_enforced"]
    assert "OutOfMemoryError" in text
    assert "> " in text
    assert "# this line" in text
    assert "enforce=True capped the allocator at this test's budget of 100 MiB" in text


def test_hypothesis_ends_at_the_smallest_batch_that_breaks_the_budget(alone: Session) -> None:
    assert alone.tests["test_any_batch_fits"]["verdict"]["over_bytes"] > 0
    assert "rows=33" in alone.notes["test_any_batch_fits"]


def test_a_test_that_got_zeros_is_told_where(alone: Session) -> None:
    section = alone.out.partition(" dry GPU ---")[2]
    assert "got zeros:\n  test_it.py:" in section
    end = alone.out.partition("vram: 1 test without a budget read values")[2]
    assert "test_it.py::test_wants_a_value  (at test_it.py:" in end
    assert "test_reads_its_loss" not in end.partition("===")[0]


def test_two_workers_report_the_same(alone: Session, tmp_path: Path) -> None:
    """The dry GPU is inherited; budgets, verdicts and peaks do not depend on who ran first."""
    many = session(tmp_path, "-p", "xdist", "-n", "2")
    assert many.junit == alone.junit
    assert many.tests.keys() == alone.tests.keys()
    for name, test in alone.tests.items():
        other = many.tests[name]
        assert other.get("verdict") == test.get("verdict"), name
        if test.get("measurements"):
            assert allocated(other) == allocated(test), name
