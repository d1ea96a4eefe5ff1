"""The messages between a test with ``vram_ranks`` and its ranks: a request goes to all ranks, each leaves a result."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pytest_vram.memory.codec import decode, encode
from pytest_vram.report.disk import write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRequest:
    """What every rank of a test is asked to do.

    Attributes:
        test: the test, as pytest's command line names it.
        options: the session's options for the rank's own pytest, by name.
        folder: the folder in which the ranks leave their results.
        figures: the folder in which they leave what they measured; None if nothing is measured.
        backend: the process group's backend; None means ``cpu:gloo,cuda:nccl`` with a GPU and ``gloo`` without.
        timeout: seconds that an operation of the process group may take.
    """

    test: str
    options: Mapping[str, Any]
    folder: Path
    figures: Path | None
    backend: str | None
    timeout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankResult:
    """How the test ended in one rank.

    Attributes:
        outcome: as in pytest's report.
        when: the part of the test that decided it, such as ``setup`` or ``call``.
        text: the traceback of a failure, or the reason of a skip.
        time: when it was decided, in seconds of the monotonic clock, which all ranks share.
    """

    outcome: Literal["passed", "failed", "skipped"]
    when: str
    text: str
    time: float

    def leave(self, folder: Path, rank: int) -> None:
        """Write the result for :func:`result_of`."""
        write_atomically(folder / f"{rank}.json", json.dumps(encode(self)))


def result_of(folder: Path, rank: int) -> RankResult | None:
    """Return the result that a rank has left so far; None without one."""
    try:
        return decode(RankResult, json.loads((folder / f"{rank}.json").read_text()))
    except (OSError, ValueError):
        return None
