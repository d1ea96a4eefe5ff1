"""The results of a session as data. The package ``report`` renders them."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_vram.memory.budget import Budget
from pytest_vram.memory.device import Environment
from pytest_vram.memory.host_peak import HostPeak
from pytest_vram.memory.measurement import Measurement
from pytest_vram.memory.process import Process
from pytest_vram.memory.verdict import Verdict

SCHEMA_VERSION = 1
NOISE_BYTES = 512
"""The size of one block of the allocator. Smaller changes are ignored, whatever percentage of the peak they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TestRecord:
    """One test: its budget, one measurement for each device, and the verdict, which is ``None`` without a budget.

    ``processes`` are the child processes that used a GPU: ranks, workers, subprocesses. ``host`` is the host memory,
    which is measured for a test with ``max_host_gb``.
    """

    __test__ = False  # pytest collects classes named Test*

    nodeid: str
    outcome: str
    budget: Budget | None = None
    measurements: tuple[Measurement, ...] = ()
    verdict: Verdict | None = None
    worst_example: str | None = None
    processes: tuple[Process, ...] = ()
    host: HostPeak | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The baseline that a report was compared with: the name of its file, and the tolerated growth in percent."""

    source: str
    tolerance_percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The tests of a session in the order in which they ran, and the baseline that they were compared with, if any."""

    schema_version: int = SCHEMA_VERSION
    environment: Environment
    tests: tuple[TestRecord, ...]
    baseline: Baseline | None = None


def grew(before_bytes: int, after_bytes: int, tolerance_percent: float) -> bool:
    """Whether a peak grew by more than the tolerance plus one block of the allocator."""
    return after_bytes > before_bytes * (1 + tolerance_percent / 100) + NOISE_BYTES
