"""One process among several that used a device."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_vram.memory.peak import Peak


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessPeak:
    """The memory of a device that one process used.

    Attributes:
        pid: the process's number.
        peak: its peaks; every figure is ``None`` if the process left no record.
        rank: its rank in a group of processes; ``None`` if it is in no group.
        start: when it first used a device, in seconds since the measurement began; ``None`` if it never did.
        end: when it ended, in the same seconds; ``None`` if that is not known.
        ended: how it ended: ``exit code 0``, ``exit code 1: ValueError: no rows``, ``left no figures``.
    """

    pid: int
    peak: Peak
    rank: int | None = None
    start: float | None = None
    end: float | None = None
    ended: str = ""
