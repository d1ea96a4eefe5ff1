"""Read the records of a dry run's processes: their figures, how they ended, and which ran at the same time."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_vram import process_end
from pytest_vram.drygpu.process.variables import EXIT_SUFFIX, SIGNAL_SUFFIX
from pytest_vram.memory.codec import decode
from pytest_vram.memory.run_record import CardRecord, RunRecord
from pytest_vram.probe import reporter

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

FIGURES = (
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "peak_device_bytes",
    "context_bytes",
    "nccl_bytes",
    "managed_bytes",
)
"""The figures of a card that are added up for processes that run at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProcess:
    """One process that imported torch in a dry run. Times are seconds since the run began.

    Attributes:
        pid, parent: the numbers of the process and of the one that started it.
        argv: its command line without the interpreter.
        rank: its rank in a group of processes; ``None`` if it is in no group.
        local_rank: its rank on this machine, as launchers set it.
        used_seconds: when it first used a card; ``None`` if it never did.
        ended_seconds: when it ended; ``None`` if that is unknown, as after SIGKILL.
        exit_code: its exit code; ``None`` if that is unknown.
        killed: what is known of the signal that ended it, as the rest of a sentence; ``""`` if none is known.
        raised: the error that ended it, or the out-of-memory error that ended one of its threads; ``""`` without one.
        out_of_memory: the message of an out-of-memory error that was not caught; ``""`` without one.
        devices: the figures of each card; ``None`` if the process left none.
        running: whether it was still running after the program had ended.
        replaced: whether it called ``exec``; the new program then has an entry of its own.
    """

    pid: int
    parent: int = 0
    argv: tuple[str, ...] = ()
    rank: int | None = None
    local_rank: int | None = None
    local_world_size: int | None = None
    group: str = ""
    restart: int | None = None
    started_seconds: float = 0.0
    used_seconds: float | None = None
    ended_seconds: float | None = None
    exit_code: int | None = None
    killed: str = ""
    raised: str = ""
    out_of_memory: str = ""
    devices: tuple[CardRecord, ...] | None = None
    running: bool = False
    replaced: bool = False

    @property
    def refusals(self) -> int:
        """The number of requests that the allocator refused with OutOfMemoryError."""
        return sum(device.num_ooms for device in self.devices or ())

    @property
    def name(self) -> str:
        """The process's name: ``rank 1 (PID 4711)``, or ``process 4711`` for a process without a rank."""
        return f"process {self.pid}" if self.rank is None else f"rank {self.rank} (PID {self.pid})"

    @property
    def fault(self) -> str:
        """Why the process may have needed more memory than its figures show; ``""`` if it ended without an error."""
        if self.exit_code not in (None, 0):
            return f"ended with exit code {self.exit_code}" + (f" ({self.raised})" if self.raised else "")
        if self.raised:
            return f"raised {self.raised}"
        if self.running and not self.killed:
            return "still ran when the program had ended, and has left no figures yet"
        if self.devices is None and not self.replaced:
            return f"ended without leaving its figures: it {self.killed or 'was killed, or called os._exit'}"
        if self.killed:
            return self.killed
        return ""

    @property
    def ended(self) -> str:
        """How the process ended, for a table."""
        return self.fault or ("went on as another program" if self.replaced else "exit code 0")


def read(folder: Path, began_ns: int, *, out_of_memory: bool | None = None) -> tuple[list[RunProcess], list[RunRecord]]:
    """Read what the processes of a run left in ``folder``.

    Args:
        folder: the folder of the run.
        began_ns: time of the monotonic clock when the run began.
        out_of_memory: whether the kernel killed a process meanwhile because host memory ran out; ``None`` if unknown.

    Returns:
        The processes in the order in which they started, and the records of those that left figures.
    """
    records = sorted(map(_record, folder.glob("[0-9]*.json")), key=lambda record: record.started_ns)
    last = {record.pid: index for index, record in enumerate(records)}
    killed: dict[int, str] = {}
    for pid, index in last.items():
        found = _signal(folder / f"{pid}{SIGNAL_SUFFIX}")
        if found is not None and found[1] >= records[index].started_ns:
            killed[index] = process_end.how(-found[0], out_of_memory=out_of_memory)
            records[index] = replace(records[index], ended_ns=found[1])
    processes = [
        _process(
            record,
            began_ns,
            killed=killed.get(index, ""),
            replaced=record.ended_ns is None and last[record.pid] > index,
        )
        for index, record in enumerate(records)
    ]
    return processes, [record for record in records if record.devices]


def _record(path: Path) -> RunRecord:
    """Read a record, with the exit code and time that the stub library wrote beside it.

    There are none after a signal or ``os._exit``.
    """
    record = decode(RunRecord, json.loads(path.read_text()))
    with contextlib.suppress(FileNotFoundError, ValueError):
        code, moment = path.with_suffix(EXIT_SUFFIX).read_text().split()
        return replace(record, exit_code=int(code), ended_ns=int(moment))
    return record


def _signal(path: Path) -> tuple[int, int] | None:
    """Return the signal that ended a process and when, if the process that waited for it wrote that to ``path``."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        number, moment = map(int, path.read_text().split())
        return number, moment
    return None


def killed_early(folder: Path, processes: Sequence[RunProcess], *, out_of_memory: bool | None) -> tuple[str, ...]:
    """Return texts that name the processes that a signal ended before they had imported torch, the first one first."""
    known = {process.pid for process in processes}
    paths = {int(path.stem): path for path in folder.glob(f"[0-9]*{SIGNAL_SUFFIX}")}
    found = sorted((s[1], pid, s[0]) for pid, path in paths.items() if pid not in known and (s := _signal(path)))
    return tuple(f"process {pid} {process_end.how(-number, out_of_memory=out_of_memory)}" for _, pid, number in found)


def _process(record: RunRecord, began_ns: int, *, killed: str, replaced: bool) -> RunProcess:
    def seconds(moment: int | None) -> float | None:
        return None if moment is None else (moment - began_ns) / 1e9

    return RunProcess(
        pid=record.pid,
        parent=record.parent,
        argv=record.argv,
        rank=record.rank,
        local_rank=record.local_rank,
        local_world_size=record.local_world_size,
        group=record.group,
        restart=record.restart,
        started_seconds=(record.started_ns - began_ns) / 1e9,
        used_seconds=seconds(record.used_ns),
        ended_seconds=seconds(record.ended_ns),
        exit_code=record.exit_code,
        killed=killed,
        raised=record.raised,
        out_of_memory=record.out_of_memory,
        devices=record.devices,
        running=record.ended_ns is None and not replaced and _still_runs(record),
        replaced=replaced,
    )


def _still_runs(record: RunRecord) -> bool:
    """Return whether the process that left a record still runs. The record has times of the monotonic clock."""
    since_boot = reporter.now() - time.monotonic()
    return reporter.runs(record.pid, record.started_ns / 1e9 + since_boot)


def concerned(processes: Sequence[RunProcess]) -> list[RunProcess]:
    """Return the processes that determine what the run needed: those that used a card, and the ranks of groups.

    If several processes have the same rank in their environment, the first is the rank, and the others are its helpers,
    such as workers of a data loader. A rank's child with the same rank in another group is its helper too, such as the
    process in which torch writes a checkpoint. If a group was restarted, only the processes of its last start count.
    """
    latest: dict[str, int] = {}
    for process in processes:
        latest[process.group] = max(latest.get(process.group, 0), process.restart or 0)
    by_pid = {process.pid: process for process in processes}
    ranks: dict[tuple[str, int], RunProcess] = {}
    for process in processes:
        parent = by_pid.get(process.parent)
        helps = parent is not None and parent.rank == process.rank
        there = (process.restart or 0) == latest[process.group] and not process.replaced
        if process.rank is not None and there and not helps:
            ranks.setdefault((process.group, process.rank), process)
    chosen = {id(process) for process in ranks.values()}
    return [
        process
        for process in processes
        if id(process) in chosen
        or (process.used_seconds is not None and (process.restart or 0) == latest[process.group])
    ]


def absent(processes: Sequence[RunProcess]) -> list[str]:
    """Return texts that name the ranks on this machine that a launcher announced and that never imported torch."""
    there: dict[tuple[str, int], set[int]] = {}
    for process in processes:
        if process.local_rank is not None and process.local_world_size:
            there.setdefault((process.group, process.local_world_size), set()).add(process.local_rank)
    return [
        f"local rank {rank} never imported torch"
        for (_, size), found in there.items()
        for rank in range(size)
        if rank not in found
    ]


def at_once(shares: Iterable[tuple[RunProcess, CardRecord]]) -> tuple[dict[str, int], int]:
    """Add up the peaks on one card of processes that ran at the same time.

    Args:
        shares: each process with its figures on the card.

    Returns:
        A pair. Its first part has, for each figure, the largest sum of the peaks of processes that ran at the same
        time, which is an upper bound of what they held together. Its second part is the largest number of processes
        that ran at the same time. A process whose end is unknown counts until the end of the run.
    """
    lives = [(p.used_seconds or p.started_seconds, p.ended_seconds, figures) for p, figures in shares]
    sums, most = dict.fromkeys(FIGURES, 0), 0
    for moment, _, _ in lives:
        living = [figures for start, end, figures in lives if start <= moment and (end is None or end > moment)]
        most = max(most, len(living))
        for name in FIGURES:
            sums[name] = max(sums[name], sum(getattr(figures, name) for figures in living))
    return sums, most
