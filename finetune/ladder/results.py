"""What the ladder found: each rung by arithmetic and as measured, as data."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from pytest_vram.memory.timeline import CATEGORIES

CACHED = "cached"
"""What the allocator holds and has not handed out at the peak; the arithmetic has none of it."""

PARTS = (*CATEGORIES, "context", CACHED)
"""What a measured peak on the device is made of, in the order in which it is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One rung, by arithmetic and as measured. Sizes in bytes."""

    name: str
    arithmetic: dict[str, int]
    """By :data:`PARTS`, see :class:`finetune.estimate.arithmetic.Estimate`."""
    measured: dict[str, int]
    """By all of :data:`PARTS`; the sum is the peak on the device."""
    managed: int
    """Paged optimizer state, beside the card's memory."""
    fits: bool
    """Whether the step ran on the card as it is."""
    seconds: float
    """How long the step's trial took here."""

    @property
    def needed(self) -> int:
        """Peak bytes on the device, as measured."""
        return sum(self.measured.values())

    @property
    def expected(self) -> int:
        """The same by arithmetic."""
        return sum(self.arithmetic.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """All rungs of one model on one card."""

    model: str
    card: str
    total_bytes: int
    seq: int
    micro_batch: int
    rank: int
    rungs: tuple[Rung, ...]


def as_json(ladder: Ladder) -> str:
    """The figures, in bytes; :func:`from_json` reads them back."""
    return json.dumps(dataclasses.asdict(ladder), indent=1) + "\n"


def from_json(text: str) -> Ladder:
    """The ladder that :func:`as_json` wrote, to draw it anew."""
    fields: dict[str, Any] = json.loads(text)
    return Ladder(**fields | {"rungs": tuple(Rung(**rung) for rung in fields["rungs"])})
