"""A session's figures: data first, rendered elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_vram.memory.budget import Budget
from pytest_vram.memory.device import Environment
from pytest_vram.memory.measurement import Measurement
from pytest_vram.memory.verdict import Verdict

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TestRecord:
    """One test: its budget, what was measured (one entry a device), and the verdict (``None`` without a budget)."""

    __test__ = False  # pytest collects classes named Test*

    nodeid: str
    outcome: str
    budget: Budget | None = None
    measurements: tuple[Measurement, ...] = ()
    verdict: Verdict | None = None
    worst_example: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Every test of a session, in the order in which they ran."""

    schema_version: int = SCHEMA_VERSION
    environment: Environment
    tests: tuple[TestRecord, ...]
