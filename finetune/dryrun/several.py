"""A dry run of several cards: the trial processes of all ranks, and the one result that theirs make up.

The processes find each other as those that ``torchrun`` starts do. If memory runs out in one of them, the others end
too, and may leave no figures.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from finetune.dryrun.messages import Result, Trial
from pytest_vram import launcher, process_end
from pytest_vram.memory.codec import decode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_GRACE = 60.0  # seconds that the other ranks may take to end when one of them has failed
_GRACE_KILLED = 2.0  # the same when a signal ended it: the others wait for it, and know nothing of it


def run_ranks(request: Path, count: int, environment: Mapping[str, str]) -> tuple[list[Path], str]:
    """Run a trial process for each rank, and wait until all have ended.

    Args:
        request: the file with the request. The results are written beside it.
        count: the number of ranks.
        environment: the environment of the processes, without the variables of a launcher.

    Returns:
        The result files by rank, of which those of ranks that failed are missing; and what such a rank has printed.
    """
    results = [request.with_name(f"result-{rank}.json") for rank in range(count)]
    kills = process_end.memory_kills()
    with ExitStack() as stack:
        said = [stack.enter_context(request.with_name(f"said-{rank}.txt").open("w+")) for rank in range(count)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "finetune.dryrun.trial_process", str(request), str(result)],
                env={**environment, **place},
                stdout=stream,
                stderr=stream,
            )
            for result, stream, place in zip(results, said, _places(count, environment), strict=True)
        ]
        try:
            failed = _first_failure(processes, results)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        if failed is None:
            return results, ""
        said[failed].seek(0)
        text = "\n".join(said[failed].read().strip().splitlines()[-12:])
        where = f"rank {failed}" if count > 1 else "its process"
        end = process_end.how(processes[failed].returncode, out_of_memory=process_end.killed_since(kills))
        return results, f"{where} {end}:\n{text or 'it printed nothing'}"


def alone() -> dict[str, str]:
    """Return the environment of this process without the place that a launcher gave it."""
    return {name: value for name, value in os.environ.items() if name not in launcher.VARIABLES}


def _places(count: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """Return what a launcher would add to the environment of each rank; nothing for a single process."""
    if count == 1:
        return [{}]
    threads = {"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1")}
    return [threads | place for place in launcher.places(count)]


def _first_failure(processes: Sequence[subprocess.Popen[bytes]], results: Sequence[Path]) -> int | None:
    """Wait for all processes, but not forever for those that wait for one that has failed.

    Returns:
        The first rank whose exit code is not 0: those that end afterwards may do so because it is gone. If there is
        none, the first rank that left no result. None if no rank failed.
    """
    running = dict(enumerate(processes))
    broken: list[int] = []
    silent: list[int] = []
    end = float("inf")
    while running and time.monotonic() < end:
        for rank in [rank for rank, process in running.items() if process.poll() is not None]:
            code = running[rank].returncode
            if code:
                broken.append(rank)
                end = min(end, time.monotonic() + (_GRACE_KILLED if code < 0 else _GRACE))
            elif not results[rank].exists():
                silent.append(rank)  # it ended because another rank did, which has not ended yet, or for no reason
                end = min(end, time.monotonic() + _GRACE)
            del running[rank]
        time.sleep(0.01)
    return next(iter(broken + silent), None)


def read_results(files: Sequence[Path]) -> list[Result | None]:
    """Return the results of all ranks; None for those that left none."""
    return [decode(Result, json.loads(file.read_text())) if file.exists() else None for file in files]


def combined(results: Sequence[Result | None]) -> Result | None:
    """Return the result of all ranks together.

    Its trials are those of the rank that needs most, and hold the trials of all ranks. A rank whose memory ran out
    counts as needing most.

    Args:
        results: the result of each rank; None for one that left none.

    Returns:
        The result; None if a rank is missing, and no other rank's trial says why.
    """
    there = [result for result in results if result is not None]
    refused = next((result for result in there if result.refusal is not None), None)
    if refused is not None:
        return refused
    out_of_memory = any(not trial.fits for result in there for trial in result.trials)
    if not there or (len(there) < len(results) and not out_of_memory):
        return None
    trials = [
        dataclasses.replace(worst(by_rank), by_rank=by_rank if len(results) > 1 else ())
        for by_rank in zip(*(result.trials for result in there), strict=False)
    ]
    return Result(trials=tuple(trials), found=there[0].found)


def worst(trials: Sequence[Trial]) -> Trial:
    """Return the trial of the rank whose memory ran out, or else of the rank that needs most of its card."""
    return max(trials, key=lambda trial: (not trial.fits, trial.peak_device, trial.peak_allocated))
