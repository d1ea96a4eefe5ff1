"""``run`` over several processes: who lived when, who failed, and what can be said of a job then."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIB = 1 << 20
SEVERAL = """
import torch, torch.multiprocessing
fork = torch.multiprocessing.get_context("fork")
def hold(mib, ready, go):
    kept = torch.empty(mib << 20, dtype=torch.uint8, device="cuda")
    ready.release()
    go.wait()
def start(mib, go):
    ready = fork.Semaphore(0)
    child = fork.Process(target=hold, args=(mib, ready, go))
    child.start()
    ready.acquire()
    return child
go, wait = fork.Event(), fork.Event()
go.set()
for mib in (600, 700):
    start(mib, go).join()
together = [start(mib, wait) for mib in (300, 500)]
wait.set()
for child in together:
    child.join()
"""


def figures(
    run_command: Callable[..., Any], tmp_path: Path, program: str, *options: str, ends: int = 0
) -> tuple[dict[str, Any], str]:
    """The JSON of a run, and what it said."""
    path, out = tmp_path / "program.py", tmp_path / "out.json"
    path.write_text(program)
    done = run_command("--json", str(out), *options, str(path))
    assert done.returncode == ends, done.stderr
    return json.loads(out.read_text()), done.stderr


def test_only_processes_that_live_at_once_are_added(run_command: Callable[..., Any], tmp_path: Path) -> None:
    found, said = figures(run_command, tmp_path, SEVERAL, "--gpu", "l4", "--")
    (device,) = found["devices"]
    assert (device["processes"], device["at_once"]) == (4, 2)
    assert device["peak_allocated_bytes"] == 800 * MIB
    assert (found["fits"], found["exact"]) == (True, False)
    assert "GPU 0, 4 processes, at most 2 at once: an upper bound" in said
    peaks = [p["devices"][0]["peak_allocated_bytes"] // MIB for p in found["processes"] if p["devices"]]
    assert peaks[:2] == [600, 700]
    assert sorted(peaks[2:]) == [300, 500]
    lives = [(p["used_seconds"], p["ended_seconds"]) for p in found["processes"] if p["devices"]]
    assert all(start < end for start, end in lives)
    assert lives[0][1] < lives[1][0]
    assert lives[1][1] < lives[2][0]
    assert ": 968 MiB on GPU 0; exit code 0" in said


CHILDREN = """
import os, signal, sys, torch, torch.multiprocessing as processes
def hold():
    torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
def well():
    hold()
def killed():
    hold()
    os.kill(os.getpid(), signal.SIGKILL)
def raises():
    hold()
    raise ValueError("no rows")
def leaves():
    hold()
    sys.exit(7)
def refused():
    torch.empty(1 << 40, dtype=torch.uint8, device="cuda")
if __name__ == "__main__":
    for method, work in METHODS:
        child = processes.get_context(method).Process(target=work)
        child.start()
        child.join()
"""
KILLED = "ended without leaving its figures: it was killed by signal 9 (SIGKILL), "


def test_a_child_that_fails_unnoticed_is_noticed(run_command: Callable[..., Any], tmp_path: Path) -> None:
    """The program ends with exit code 0 though most of its children failed."""
    methods = '("fork", well), ("fork", killed), ("spawn", raises), ("fork", leaves), ("fork", refused)'
    found, said = figures(run_command, tmp_path, CHILDREN.replace("METHODS", f"({methods})"), "--gpu", "l4", "--")
    assert found["exit_code"] == 0
    failed = [f"ended with exit code {code}" for code in (1, 7, 1)]
    ends = [process["ended"] for process in found["processes"] if process["used_seconds"] is not None]
    assert [ends[0], *ends[2:]] == ["exit code 0", *failed]
    assert ends[1].startswith(KILLED)
    assert found["verdict"] == "does not fit", "the last child was refused memory, and gave up"
    assert len(found["faults"]) == 4
    assert f"no figures; {KILLED}" in said


RANKS = """
import os, signal, sys, torch
rank = int(os.environ["RANK"])
torch.cuda.set_device(rank)
kept = torch.empty((rank + 1) * 64 << 20, dtype=torch.uint8, device="cuda")
if rank == 1:
    raise EOFError("Ran out of input")
if rank == 2:
    os.kill(os.getpid(), signal.SIGKILL)
"""
LAUNCHER = """
import os, subprocess, sys
ranks = [
    subprocess.Popen([sys.executable, RANKS], env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank),
                      "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_PORT": "29511"})
    for rank in range(3)
]
for rank in ranks:
    rank.wait()
"""


def test_a_job_that_lost_ranks_does_not_fit(run_command: Callable[..., Any], tmp_path: Path) -> None:
    """Its launcher ends with exit code 0, as Lightning's does; the command does not."""
    (tmp_path / "ranks.py").write_text(RANKS)
    launcher = LAUNCHER.replace("RANKS", repr(str(tmp_path / "ranks.py")))
    found, said = figures(run_command, tmp_path, launcher, "--gpu", "l4", "--count", "3", "--", ends=1)
    assert (found["exit_code"], found["fits"], found["verdict"]) == (0, None, "unknown")
    pids = {p["rank"]: p["pid"] for p in found["processes"]}
    faults = {fault.partition(" (PID")[0]: fault for fault in found["faults"]}
    assert faults["rank 1"] == f"rank 1 (PID {pids[1]}) ended with exit code 1 (EOFError: Ran out of input)"
    assert faults["rank 2"].startswith(f"rank 2 (PID {pids[2]}) {KILLED}")
    assert len(faults) == 2
    assert f"UNKNOWN whether it fits: {found['faults'][0]}" in said


FORKED = """
import os, torch, torch.multiprocessing
fork = torch.multiprocessing.get_context("fork")
def work(rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="3", MASTER_PORT="29511")
    torch.cuda.set_device(rank)
    kept = torch.empty((rank + 1) * 64 << 20, dtype=torch.uint8, device="cuda")
for rank in RANKS:
    child = fork.Process(target=work, args=(rank,))
    child.start()
    child.join()
"""


def test_every_card_is_told_with_its_rank(run_command: Callable[..., Any], tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    options = ("--gpu", "l4", "--count", "3", "--html", str(page), "--")
    found, said = figures(run_command, tmp_path, FORKED.replace("RANKS", "range(3)"), *options)
    assert found["fits"] is True
    cards = [
        (p["rank"], d["index"], d["peak_allocated_bytes"] // MIB) for p in found["processes"] for d in p["devices"]
    ]
    assert sorted(cards) == [(0, 0, 64), (1, 1, 128), (2, 2, 192)]
    assert "rank 2 (PID" in said
    text = page.read_text()
    assert all(f">{p['pid']}</td>" in text for p in found["processes"] if p["devices"])


def test_a_rank_that_never_starts_is_missed(run_command: Callable[..., Any], tmp_path: Path) -> None:
    program = FORKED.replace("RANKS", "(0, 2)")
    found, _ = figures(run_command, tmp_path, program, "--gpu", "l4", "--count", "3", "--", ends=1)
    assert (found["fits"], found["faults"]) == (None, ["local rank 1 never imported torch"])


HALVES = """
import torch
size = 64 << 30
while True:
    try:
        kept = torch.empty(size, dtype=torch.uint8, device="cuda")
        break
    except torch.OutOfMemoryError:
        size //= 2
assert size == 8 << 30
"""


def test_a_program_that_halves_its_batch_fits(run_command: Callable[..., Any], tmp_path: Path) -> None:
    found, said = figures(run_command, tmp_path, HALVES, "--gpu", "rtx-4080", "--")
    assert (found["fits"], found["num_ooms"], found["peak_allocated_bytes"]) == (True, 3, 8 << 30)
    assert "after 3 out-of-memory errors: the card was full then, and the program went on with less" in said


def test_a_program_that_gives_up_does_not_fit(run_command: Callable[..., Any], tmp_path: Path) -> None:
    gives_up = HALVES.replace("size //= 2", "raise SystemExit('no batch fits')")
    found, said = figures(run_command, tmp_path, gives_up, "--gpu", "rtx-4080", "--", ends=1)
    assert (found["fits"], found["num_ooms"]) == (False, 1)
    assert "DID NOT FIT: 1 out-of-memory error" in said
