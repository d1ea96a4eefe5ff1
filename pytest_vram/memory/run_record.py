"""The record that one process of ``python -m pytest_vram run`` leaves: the process writes it, and the command reads it.

:mod:`pytest_vram.memory.codec` converts it to JSON and back. Sizes are in bytes. Times are nanoseconds of the monotonic
clock, which all processes share.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pytest_vram.memory.measurement import Holder, HostRead
from pytest_vram.memory.note import Note
from pytest_vram.memory.timeline import Timeline
from pytest_vram.memory.work import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFigures:
    """What a program needed of one card: one of its processes, or all of them together.

    Attributes:
        index: number of the card, without ``CUDA_VISIBLE_DEVICES``.
        peak_allocated_bytes: peak of live blocks.
        peak_reserved_bytes: peak of the memory that the allocator reserved.
        peak_device_bytes: peak of all memory on the card, the context included.
        context_bytes: the part of the context in ``peak_device_bytes``.
        nccl_bytes: the part of NCCL's connections in ``peak_device_bytes``.
        managed_bytes: peak of managed (paged) memory, which is not counted in ``peak_device_bytes``.
        total_bytes: memory of the card.
        num_alloc_retries: how often the allocator emptied its cache to satisfy a request.
        num_ooms: how often a request was refused: by the allocator with OutOfMemoryError, or by NCCL.
        work: kernels, copies and waits.
    """

    index: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_device_bytes: int
    context_bytes: int
    nccl_bytes: int
    managed_bytes: int
    total_bytes: int
    num_alloc_retries: int
    num_ooms: int
    work: Work


@dataclass(frozen=True, slots=True, kw_only=True)
class CardRecord(CardFigures):
    """What one process needed of one card, and what held its memory.

    Attributes:
        timeline: memory over time; None if it was not recorded.
        holders: the lines of code that held the most at the peak, the largest first; empty without a timeline.
    """

    timeline: Timeline | None = None
    holders: tuple[Holder, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One process that imported torch.

    Attributes:
        pid: its number.
        parent: the number of the process that started it.
        argv: its command line without the interpreter.
        started_ns: when it imported torch, or was forked.
        used_ns: when it first used a card; None if it did not.
        ended_ns: when it ended; None while it runs, and after a signal.
        exit_code: its exit code; None if it is unknown.
        raised: the first line of the error that ended it or one of its threads; ``""`` without one.
        out_of_memory: the message of an out-of-memory error that was not caught; ``""`` without one.
        rank: its rank in a group of processes; None if it is in no group.
        local_rank: its rank on this machine, as launchers set it.
        local_world_size: number of ranks on this machine, as launchers set it.
        restart: how often its launcher has restarted the group.
        group: what the ranks of one group have in common: torchrun's run id, or the port of the group's store.
        devices: the cards that it used; None until it ends, so a process that is killed leaves None.
        host_reads: values of a card that the program read.
        missing_functions: CUDA functions that it called and the dry GPU lacks.
        notes: the assumptions behind the figures.
        versions: by name, the versions of Python, CUDA and the packages that were imported.
    """

    pid: int
    parent: int
    argv: tuple[str, ...]
    started_ns: int
    used_ns: int | None = None
    ended_ns: int | None = None
    exit_code: int | None = None
    raised: str = ""
    out_of_memory: str = ""
    rank: int | None = None
    local_rank: int | None = None
    local_world_size: int | None = None
    restart: int | None = None
    group: str = ""
    devices: tuple[CardRecord, ...] | None = None
    host_reads: tuple[HostRead, ...] = ()
    missing_functions: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()
    versions: dict[str, str | None] = field(default_factory=dict)
