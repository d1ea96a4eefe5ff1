"""What a budget says of a measurement. Exactly one of three, and "could not be measured" is never a pass."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_vram.memory.measurement import Holder


@dataclass(frozen=True, slots=True, kw_only=True)
class Within:
    headroom_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Exceeded:
    over_bytes: int
    phase: str | None = None
    culprits: tuple[Holder, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmeasured:
    reason: str


Verdict = Within | Exceeded | Unmeasured
