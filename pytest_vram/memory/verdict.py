"""The result of comparing a measurement with a budget: one of three. A test that was not measured does not pass."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Within:
    """The peak is within the budget, by ``headroom_bytes``."""

    headroom_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Exceeded:
    """The peak is ``over_bytes`` above the budget, and was reached in ``phase``, if that is known."""

    over_bytes: int
    phase: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmeasured:
    """There is no measurement to compare the budget with."""

    reason: str


Verdict = Within | Exceeded | Unmeasured
