"""The result of the ladder as data: each rung by arithmetic and as measured."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from pytest_vram.memory.timeline import CATEGORIES

CACHED = "cached"
"""Category of the memory that the allocator holds and that no tensor uses at the peak. The arithmetic has none."""

PARTS = (*CATEGORIES, "context", CACHED)
"""The parts of a measured peak on the device, in the order in which they are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One rung, by arithmetic and as measured. Sizes are in bytes."""

    name: str
    arithmetic: dict[str, int]
    """Bytes of each of :data:`PARTS` but the last, as :func:`finetune.estimate.arithmetic.estimate` computes them."""
    measured: dict[str, int]
    """Bytes of each of :data:`PARTS`, as measured. Their sum is the peak on the device."""
    managed: int
    """Paged optimizer state, which is not part of the card's memory."""
    fits: bool
    """Whether the step ran with the memory that the card has."""
    seconds: float
    """How long the trial of the step took."""

    @property
    def needed(self) -> int:
        """Peak bytes on the device, as measured."""
        return sum(self.measured.values())

    @property
    def expected(self) -> int:
        """Peak bytes on the device, as computed."""
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
    context_caveat: str
    """How far the size of the card's CUDA context can be trusted; empty if it was measured on such a card."""
    rungs: tuple[Rung, ...]


def as_json(ladder: Ladder) -> str:
    """Return the ladder as JSON. Sizes are in bytes."""
    return json.dumps(dataclasses.asdict(ladder), indent=1) + "\n"
