"""What a budget says of a measurement. Exactly one of three, and "could not be measured" is never a pass."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_vram.memory.measurement import Holder


@dataclass(frozen=True, slots=True, kw_only=True)
class Within:
    """The budget holds; ``headroom_bytes`` are left of it."""

    headroom_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Exceeded:
    """The peak is ``over_bytes`` above the budget; it fell into ``phase``, where that is known."""

    over_bytes: int
    phase: str | None = None
    culprits: tuple[Holder, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmeasured:
    """The budget could not be held against anything."""

    reason: str


Verdict = Within | Exceeded | Unmeasured
