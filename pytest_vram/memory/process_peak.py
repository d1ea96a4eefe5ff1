"""One process among several that used a device."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_vram.memory.peak import Peak


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessPeak:
    """What one process needed of a device.

    Attributes:
        pid: the process's number.
        peak: its peaks; every figure is ``None`` where the process left none.
        rank: its rank in a group of processes; ``None`` where it has none.
        start: when it first used a device, in seconds since the measurement began; ``None`` if it never did.
        end: when it ended; ``None`` where that is not known.
        ended: how it ended: ``exit code 0``, ``exit code 1: ValueError: no rows``, ``left no figures``.
    """

    pid: int
    peak: Peak
    rank: int | None = None
    start: float | None = None
    end: float | None = None
    ended: str = ""
