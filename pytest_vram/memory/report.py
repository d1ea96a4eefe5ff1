"""A session's figures: data first, rendered elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_vram.memory.budget import Budget
from pytest_vram.memory.device import Environment
from pytest_vram.memory.measurement import Measurement
from pytest_vram.memory.process import Process
from pytest_vram.memory.verdict import Verdict

SCHEMA_VERSION = 1
NOISE_BYTES = 512
"""One block: a percentage of a peak of a few kilobytes means nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TestRecord:
    """One test: its budget, what was measured (one entry a device), and the verdict (``None`` without a budget).

    ``processes`` are those below the test's own that used a GPU: ranks, workers, subprocesses.
    """

    __test__ = False  # pytest collects classes named Test*

    nodeid: str
    outcome: str
    budget: Budget | None = None
    measurements: tuple[Measurement, ...] = ()
    verdict: Verdict | None = None
    worst_example: str | None = None
    processes: tuple[Process, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What a report was held against: the name of the file, and the growth that passes, in percent."""

    source: str
    tolerance_percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Every test of a session, in the order in which they ran; ``baseline`` where it was held against one."""

    schema_version: int = SCHEMA_VERSION
    environment: Environment
    tests: tuple[TestRecord, ...]
    baseline: Baseline | None = None


def grew(before_bytes: int, after_bytes: int, tolerance_percent: float) -> bool:
    """Whether a peak grew by more than the tolerance, and by more than a block."""
    return after_bytes > before_bytes * (1 + tolerance_percent / 100) + NOISE_BYTES
