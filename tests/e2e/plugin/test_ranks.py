"""Tests of several processes on dry GPUs, from the outside: ranks, children that are killed, several cards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from pathlib import Path

MB = 2**20

PROJECT = """
import os, signal, subprocess, sys
import pytest, torch
import torch.distributed as dist

def block(mb, device="cuda"):
    return torch.empty(mb << 20, dtype=torch.uint8, device=device)

@pytest.fixture
def model(gpu):
    return block(1, gpu.device)

@pytest.mark.vram_ranks(2)
@pytest.mark.vram(max_mb=5)
@pytest.mark.parametrize("size", [2])
def test_fits(gpu, vram, model, size):
    rank = dist.get_rank()
    assert gpu.device.index == rank and dist.get_world_size() == 2
    ranks = [torch.zeros(1, dtype=torch.int64, device=gpu.device) for _ in range(2)]
    dist.all_gather(ranks, torch.tensor([rank], device=gpu.device))
    assert [r.item() for r in ranks] == [0, 1]
    with vram.measure("step"):
        held = block(size + rank, gpu.device)

@pytest.mark.vram_ranks(2)
@pytest.mark.vram(max_mb=5)
def test_one_rank_is_too_large(gpu):
    held = block(3 + 4 * dist.get_rank(), gpu.device)

@pytest.mark.vram_ranks(2)
def test_one_rank_fails():
    if dist.get_rank() == 1:
        raise ValueError("the loss of rank 1 is negative")
    dist.barrier()  # rank 1 never comes

CHILD = "import torch, os, signal; x = torch.empty(8 << 20, dtype=torch.uint8, device='cuda:1'); "

@pytest.mark.vram(max_mb=4)
def test_child_on_the_second_card():
    subprocess.run([sys.executable, "-c", CHILD], check=True)

FORKS = '''
import torch, multiprocessing

def work():
    global held
    held = torch.empty(8 << 20, dtype=torch.uint8, device="cuda:1")

process = multiprocessing.get_context("fork").Process(target=work)
process.start()
process.join()
assert process.exitcode == 0
'''

@pytest.mark.vram(max_mb=4)
def test_forked_child():
    subprocess.run([sys.executable, "-c", FORKS], check=True)

def in_a_rank(rank):
    global held
    held = block(4 << rank, f"cuda:{rank}")

@pytest.mark.vram(max_mb=4)
def test_forks_ranks_of_its_own():
    torch.multiprocessing.start_processes(in_a_rank, nprocs=2, start_method="fork")

@pytest.mark.vram(max_mb=64)
def test_killed_and_within_whatever_it_allocated():
    subprocess.run([sys.executable, "-c", CHILD + "os.kill(os.getpid(), signal.SIGKILL)"])

@pytest.mark.vram(max_mb=16)
def test_child_is_killed():
    subprocess.run([sys.executable, "-c", CHILD + "os.kill(os.getpid(), signal.SIGKILL)"])

@pytest.mark.vram(max_mb=16)
def test_child_still_runs():
    process = subprocess.Popen([sys.executable, "-c", CHILD + "print('up', flush=True); input()"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    globals()["left"] = process

def test_afterwards():
    left.communicate(b"\\n")
"""

ON_THE_HOST = """
import time
import pytest, torch
import torch.distributed as dist

@pytest.mark.vram_ranks(2)
@pytest.mark.vram(max_mb=2)
def test_values(gpu):
    x = torch.ones(3 << (18 + dist.get_rank()))  # 3 and 6 MiB
    dist.all_reduce(x[:4])
    assert x[0] == 2

@pytest.mark.vram_ranks(2, timeout=60)
def test_late():
    if dist.get_rank() == 1:
        time.sleep(300)  # here it waits
"""


class Session(NamedTuple):
    out: str
    tests: dict[str, Any]
    outcomes: dict[str, str]


def session(folder: Path, source: str, *arguments: str, conftest: str = "") -> Session:
    folder.joinpath("test_it.py").write_text(source)
    folder.joinpath("conftest.py").write_text(conftest)
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")}
    variables |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1", "PYTEST_VRAM_RANKS_TIMEOUT": "90"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "vram", "-rA"]
    command += ["--vram-report", "--vram-output=r.json", *arguments]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=500)
    report = json.loads((folder / "r.json").read_text())
    outcomes = {}
    for line in done.stdout.splitlines():
        word, _, rest = line.partition(" ")
        if word in ("PASSED", "FAILED", "ERROR") and "::" in rest:
            outcomes[rest.partition("::")[2].split(" ")[0]] = word
    tests = {test["nodeid"].partition("::")[2]: test for test in report["tests"]}
    return Session(done.stdout + done.stderr, tests, outcomes)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, Session]:
    """The sessions of `PROJECT` and of `ON_THE_HOST`. They run side by side, because the second one mostly waits."""
    with ThreadPoolExecutor(1) as beside:
        host = beside.submit(session, tmp_path_factory.mktemp("host"), ON_THE_HOST, "--vram-gpu=host")
        return session(tmp_path_factory.mktemp("ranks"), PROJECT, "--vram-gpu=dry:a100-80x2"), host.result()


@pytest.fixture(scope="module")
def ranks(sessions: tuple[Session, Session]) -> Session:
    return sessions[0]


def peaks(test: dict[str, Any]) -> dict[Any, int]:
    return {p.get("rank"): max(m["peak"]["allocated_bytes"] for m in p["measurements"]) for p in test["processes"]}


def test_a_test_runs_in_every_rank_with_its_fixtures_and_phases(ranks: Session) -> None:
    assert ranks.outcomes["test_fits[2]"] == "PASSED", ranks.out
    test = ranks.tests["test_fits[2]"]
    assert {rank: size // MB for rank, size in peaks(test).items()} == {0: 3, 1: 4}
    phases = {p["rank"]: [phase["name"] for m in p["measurements"] for phase in m["phases"]] for p in test["processes"]}
    assert phases == {0: ["step"], 1: ["step"]}
    assert test["measurements"][0]["peak"].get("allocated_bytes", 0) == 0  # nothing ran in the test's own process


def test_the_budget_holds_for_every_rank_and_names_the_one_that_breaks_it(ranks: Session) -> None:
    assert ranks.outcomes["test_one_rank_is_too_large"] == "FAILED"
    assert "the test needed 7.00 MiB of allocated memory, 2.00 MiB more than its budget" in ranks.out
    assert "process rank 1 (PID " in ranks.out
    assert "the largest rank needs 40.0% more than the mean of the ranks" in ranks.out


def test_the_first_failure_is_told_with_its_rank(ranks: Session) -> None:
    assert ranks.outcomes["test_one_rank_fails"] == "FAILED"
    assert "rank 1 of 2 failed first, in its call:" in ranks.out
    assert "the loss of rank 1 is negative" in ranks.out
    assert "the other ranks:" in ranks.out


def test_a_child_counts_on_whichever_card_it_is_and_a_killed_one_is_no_pass(ranks: Session) -> None:
    assert ranks.outcomes["test_child_on_the_second_card"] == "FAILED"
    assert ranks.outcomes["test_forked_child"] == "FAILED", ranks.out
    assert peaks(ranks.tests["test_forked_child"]) == {None: 8 * MB}
    assert "test_child_is_killed" not in ranks.outcomes
    verdict = ranks.tests["test_child_is_killed"]["verdict"]
    assert verdict["verdict"] == "unmeasured"
    assert "it was killed, or ended by os._exit" in verdict["reason"]
    assert "its allocator had 20.0 MiB from the driver at most" in verdict["reason"]
    assert ranks.outcomes["test_killed_and_within_whatever_it_allocated"] == "PASSED", ranks.out
    assert ranks.tests["test_killed_and_within_whatever_it_allocated"]["verdict"]["headroom_bytes"] == 44 * MB


def test_ranks_that_a_test_forks_itself_can_use_their_cards(ranks: Session) -> None:
    """``accelerate.notebook_launcher`` forks too: nothing may have asked torch about GPUs in the test's own process."""
    assert ranks.outcomes["test_forks_ranks_of_its_own"] == "FAILED", ranks.out
    processes = ranks.tests["test_forks_ranks_of_its_own"]["processes"]
    found = [(m["device"]["index"], m["peak"]["allocated_bytes"]) for p in processes for m in p["measurements"]]
    assert sorted(found) == [(0, 4 * MB), (1, 8 * MB)]
    assert "the test needed 8.00 MiB of allocated memory, 4.00 MiB more than its budget of 4.00 MiB" in ranks.out


def test_a_child_that_still_runs_is_asked_and_named(ranks: Session) -> None:
    assert ranks.outcomes["test_child_still_runs"] == "PASSED", ranks.out
    assert peaks(ranks.tests["test_child_still_runs"]) == {None: 8 * MB}
    assert "test_child_still_runs left a process running: python -c import torch" in ranks.out
    (left,) = ranks.tests["test_child_still_runs"]["processes"]
    assert left["left_bytes"] > 8 * MB  # with its context


TWO_CARDS = """
import pytest, torch

@pytest.mark.vram(max_mb=4)
def test_second_card(gpu):
    assert torch.cuda.device_count() == 2
    torch.empty(3 << 20, dtype=torch.uint8, device="cuda:1")
"""

ASKS_FOR_TWO = "from pytest_vram.drygpu import activate\nactivate('a100-80', count=2)\n"


@pytest.mark.parametrize(
    ("choice", "conftest"), [("--vram-gpu=dry:a100-80x2", ""), ("--vram-gpu=dry:a100-80", ASKS_FOR_TWO)]
)
def test_two_cards_with_workers(tmp_path: Path, choice: str, conftest: str) -> None:
    done = session(tmp_path, TWO_CARDS, choice, "-p", "xdist", "-n", "1", conftest=conftest)
    assert done.outcomes == {"test_second_card": "PASSED"}, done.out
    second = done.tests["test_second_card"]["measurements"][1]
    assert second["peak"]["allocated_bytes"] == 3 * MB


@pytest.mark.parametrize("choice", ["--vram-gpu=dry:l4", "--vram-gpu=dry:a100-80x4"])
def test_a_conftest_does_not_overrule_the_option(tmp_path: Path, choice: str) -> None:
    tmp_path.joinpath("conftest.py").write_text(ASKS_FOR_TWO)
    tmp_path.joinpath("test_it.py").write_text("def test_it(): pass\n")
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")}
    variables["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "vram", choice]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert f"the dry GPUs were chosen with {choice}" in text
    assert "activate() asks for 2 x NVIDIA A100-SXM4-80GB" in text


def test_ranks_on_the_host_compute_and_a_late_one_is_told_with_its_place(sessions: tuple[Session, Session]) -> None:
    done = sessions[1]
    assert done.outcomes == {"test_values": "FAILED", "test_late": "FAILED"}
    assert "the test needed 6.00 MiB of allocated memory" in done.out, done.out
    assert {rank: size // MB for rank, size in peaks(done.tests["test_values"]).items()} == {0: 3, 1: 6}
    assert "rank 1 of 2 did not end within 60 s:" in done.out
    shown = done.out.partition("(most recent call first):\n")[2].splitlines()
    line = ON_THE_HOST[: ON_THE_HOST.index("# here it waits")].count("\n") + 1
    assert f'test_it.py", line {line} in test_late' in shown[0], done.out
    assert "the other ranks:\n  rank 0 " in done.out
