"""Runs a test with ``@pytest.mark.vram_ranks(4)`` once in each of four ranks, and reports which rank failed first.

Each rank is a separate pytest process for this one test, so that fixtures, parameters and conftests work as usual; see
``rankchild.py``. The test's own process only starts the ranks and waits for them.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram import process_end
from pytest_vram.drygpu.process.activate import CARD_VARIABLE, LEAST_VARIABLE, count_of, with_count
from pytest_vram.errors import VramRankFailed, VramUsageError
from pytest_vram.launcher import places
from pytest_vram.plugin.enforcer import judged
from pytest_vram.plugin.markers import RANKS_MARK
from pytest_vram.plugin.rank_messages import RankRequest, RankResult, result_of
from pytest_vram.plugin.ranks import CHILD_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_RANKS = 64
_TIMEOUT = 600.0
_GRACE = 10.0  # seconds that the other ranks have to end by themselves once one has failed
_TAIL = 2_000  # characters of a rank's output that are shown
_FRAMES = 12  # newest frames of a late rank that are shown; the older frames are pytest's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """What the marker asks for.

    Attributes:
        count: the number of ranks.
        timeout: the seconds within which all ranks have to end.
        backend: the process group's backend; ``None`` means ``cpu:gloo,cuda:nccl`` with a GPU and ``gloo`` without.
    """

    count: int
    timeout: float = _TIMEOUT
    backend: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ends:
    """How the ranks ended.

    Attributes:
        late: the ranks that did not end in time.
        stopped: the ranks that were terminated because another one had failed.
        ended_at: when each rank ended, on the monotonic clock.
        out_of_memory: whether the kernel killed a process meanwhile because host memory ran out; None if unknown.
    """

    late: list[int]
    stopped: list[int]
    ended_at: dict[int, float]
    out_of_memory: bool | None


def wanted(item: pytest.Item) -> Ranks | None:
    """Return what the test's marker asks for, or None if the test has no marker or this process is a rank itself.

    Raises:
        VramUsageError: if the marker cannot be used.
    """
    mark = item.get_closest_marker(RANKS_MARK)
    if mark is None or CHILD_VARIABLE in os.environ:
        return None
    example = "write the number of ranks, as in vram_ranks(4)"
    unknown = sorted(set(mark.kwargs) - {"timeout", "backend"})
    if unknown:
        raise VramUsageError(f"vram_ranks() has no argument {unknown[0]!r}: it takes a number, timeout and backend")
    if len(mark.args) != 1:
        raise VramUsageError(f"vram_ranks({', '.join(map(repr, mark.args))}): {example}")
    count, timeout = mark.args[0], mark.kwargs.get("timeout", _TIMEOUT)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_RANKS:
        raise VramUsageError(f"vram_ranks({count!r}): {example}; 1 to {MOST_RANKS} are possible")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < float("inf"):
        raise VramUsageError(f"vram_ranks(timeout={timeout!r}): write seconds above 0")
    backend = mark.kwargs.get("backend")
    if backend is not None and not isinstance(backend, str):
        raise VramUsageError(f"vram_ranks(backend={backend!r}): write a name, such as 'nccl' or 'gloo'")
    test_case = getattr(item, "cls", None)
    if not isinstance(item, pytest.Function) or (test_case and issubclass(test_case, unittest.TestCase)):
        raise VramUsageError("vram_ranks works on test functions and methods, not on unittest.TestCase or doctests")
    return Ranks(count=count, timeout=float(timeout), backend=backend)


def empty(item: pytest.Item) -> None:
    """Keep the test's own process from setting up the test's fixtures, because each rank sets up its own."""
    item.fixturenames = []  # type: ignore[attr-defined]  # pytest sets it on functions only


def run(item: pytest.Function, ranks: Ranks, figures: Path | None) -> None:
    """Run the test in its ranks, and wait for them.

    Args:
        item: the test.
        ranks: the number of ranks, and how long they may take.
        figures: the folder in which each rank leaves its figures; ``None`` if nothing is measured.

    Raises:
        VramRankFailed: if a rank failed, or not all ended in time; the message is that of the first rank that failed.
    """
    __tracebackhide__ = True
    if not hasattr(os, "killpg"):
        raise pytest.skip.Exception("vram_ranks ends late ranks by their process group, and this system has none")
    with tempfile.TemporaryDirectory(prefix="vram-ranks-") as name:
        folder = Path(name)
        started: list[subprocess.Popen[bytes]] = []
        try:
            _start(started, item, ranks, folder, figures)
            ends = _wait(started, folder, ranks.timeout)
        finally:  # Ctrl-C does not reach the ranks, which have sessions of their own
            for process in started:
                if process.poll() is None:
                    _end(process)
        _judge(started, folder, ranks, ends)


def _start(
    started: list[subprocess.Popen[bytes]], item: pytest.Function, ranks: Ranks, folder: Path, figures: Path | None
) -> None:
    """Start the ranks, and add each to ``started`` at once, so that the caller ends them even after an interrupt."""
    request = RankRequest(
        test=f"{item.path}::{item.nodeid.partition('::')[2]}",
        options=_options(item.config),
        folder=folder,
        figures=figures,
        backend=ranks.backend,
        timeout=ranks.timeout,
    )
    (folder / "request").write_bytes(pickle.dumps(request))
    command = [sys.executable, "-m", "pytest_vram.plugin.rankchild", str(folder / "request")]
    for rank, place in enumerate(places(ranks.count)):
        with (folder / f"{rank}.out").open("wb") as out:
            started.append(
                subprocess.Popen(
                    command,
                    env=_environment(rank, ranks.count, place),
                    cwd=item.config.invocation_params.dir,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )


def _environment(rank: int, count: int, place: Mapping[str, str]) -> dict[str, str]:
    variables = {**os.environ, **place, CHILD_VARIABLE: str(rank)}
    card = variables.get(CARD_VARIABLE, "")
    if card:  # dry GPUs cost nothing, so each rank gets one
        least = max(count, count_of(card))
        variables[LEAST_VARIABLE], variables[CARD_VARIABLE] = str(least), with_count(card, least)
    return variables


def _options(config: pytest.Config) -> Mapping[str, Any]:
    """Return the session's options for a rank's pytest, without those that concern the session as a whole."""
    options = {name: value for name, value in vars(config.option).items() if _plain(value) and name != "file_or_dir"}
    changed: dict[str, Any] = {
        "numprocesses": None, "maxprocesses": None, "dist": "no", "distload": False, "tx": [], "usepdb": False,
        "xmlpath": None, "lf": False, "failedfirst": False, "newfirst": False, "stepwise": False,
        "stepwise_skip": False, "stepwise_reset": False, "cacheclear": False, "keyword": "", "markexpr": "",
        "deselect": None, "maxfail": 0, "reruns": None, "collectonly": False, "runxfail": True, "no_cov": True,
        "vram_report": None, "vram_output": None, "vram_baseline": None, "vram_update_baseline": None,
        "vram_suggest": None, "basetemp": None,
    }  # fmt: skip
    options |= {name: value for name, value in changed.items() if name in options}
    if options.get("hypothesis_seed", "") is None:
        options["hypothesis_seed"] = str(int.from_bytes(os.urandom(4), "big"))  # the same examples on all ranks
    options["rootdir"] = str(config.rootpath)
    options["inifilename"] = None if config.inipath is None else str(config.inipath)
    blocked = ["no:terminal", "no:cacheprovider", "no:rerunfailures"]
    options["plugins"] = [*(options.get("plugins") or []), *blocked]
    return options


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(part) for part in value)
    if isinstance(value, dict):
        return all(_plain(part) for part in (*value, *value.values()))
    return value is None or isinstance(value, str | int | float | bool)


def _wait(started: list[subprocess.Popen[bytes]], folder: Path, timeout: float) -> _Ends:
    """Wait until all ranks have ended, until the time is up, or until ``_GRACE`` seconds after one has failed.

    Ranks that still run then are terminated.
    """
    deadline, failed = time.monotonic() + timeout, False
    kills = process_end.memory_kills()
    ended_at: dict[int, float] = {}
    watches = [
        threading.Thread(target=_note_end, args=(rank, process, ended_at), daemon=True)
        for rank, process in enumerate(started)
    ]
    for watch in watches:
        watch.start()
    late: list[int] = []
    stopped: list[int] = []
    while running := [rank for rank, process in enumerate(started) if process.poll() is None]:
        if not failed and any(_failed(folder, rank, process) for rank, process in enumerate(started)):
            failed, deadline = True, min(deadline, time.monotonic() + _GRACE)
        if time.monotonic() > deadline:
            for rank in running:
                _end(started[rank])
            late, stopped = ([], running) if failed else (running, [])
            break
        time.sleep(0.02)
    for watch in watches:
        watch.join()
    out_of_memory = process_end.killed_since(kills)
    return _Ends(late=late, stopped=stopped, ended_at=ended_at, out_of_memory=out_of_memory)


def _note_end(rank: int, process: subprocess.Popen[bytes], ended_at: dict[int, float]) -> None:
    """Note when a rank ends, which must not wait for the next look: others may fail for it a moment later."""
    process.wait()
    ended_at[rank] = time.monotonic()


def _failed(folder: Path, rank: int, process: subprocess.Popen[bytes]) -> bool:
    ended = process.poll() is not None  # asked first, because a rank leaves its result before it ends
    result = result_of(folder, rank)
    return result.outcome == "failed" if result else ended


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a rank and the processes that it started, by the process group that the rank leads."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3)


def _judge(started: list[subprocess.Popen[bytes]], folder: Path, ranks: Ranks, ends: _Ends) -> None:
    __tracebackhide__ = True
    results = {rank: result_of(folder, rank) for rank in range(ranks.count)}
    states = {rank: _state(result, started[rank].returncode, ends) for rank, result in results.items()}
    states |= dict.fromkeys(ends.late, "did not end in time")
    states |= {rank: "was ended because of it" for rank in ends.stopped if results[rank] is None}
    failed = [rank for rank, result in results.items() if result and result.outcome == "failed"]
    broken = [rank for rank, result in results.items() if result is None and rank not in ends.stopped]
    if failed or broken:
        # A rank that died is told before those that failed because it was gone, and after the one for which it died.
        times = {rank: ends.ended_at[rank] for rank in broken}
        times |= {rank: result.time for rank, result in results.items() if result and rank in failed}
        first = min(times, key=lambda rank: times[rank])
        what = f"{states[first]} before its test did"
        what = f"did not end within {ranks.timeout:g} s" if first in ends.late else what
        what = "failed first" if first in failed else what
        told = results[first]
        text = (told.text if told else "") or _tail(folder, first)
        others = "\n".join(f"  rank {rank} {state}" for rank, state in states.items() if rank != first)
        where = told.when if told else ""
        raise judged(
            VramRankFailed(
                f"rank {first} of {ranks.count} {what}{f', in its {where}' if where else ''}:\n{text}"
                + (f"\nthe other ranks:\n{others}" if others else ""),
                rank=first,
            )
        )
    skipped = [(rank, result) for rank, result in results.items() if result and result.outcome == "skipped"]
    if skipped:
        rank, result = skipped[0]
        raise pytest.skip.Exception(f"rank {rank} of {ranks.count}: {result.text}", _use_item_location=True)


def _state(result: RankResult | None, code: int, ends: _Ends) -> str:
    return process_end.how(code, out_of_memory=ends.out_of_memory) if result is None else result.outcome


def _tail(folder: Path, rank: int) -> str:
    """Return where a late rank was, newest frame first, and the end of what a rank printed."""
    text = (folder / f"{rank}.out").read_text(errors="replace")[-_TAIL:].strip() or "it printed nothing"
    try:
        place = (folder / f"{rank}.where").read_text(errors="replace").splitlines()[: 1 + _FRAMES]
    except OSError:
        place = []  # it ended before it could say
    return "\n".join([*place, text])
