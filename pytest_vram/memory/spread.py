"""How far the figure of a card may lie from one that rests on assumptions: as far as measured runs lay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_vram.memory import shared_blocks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_vram.memory.note import Note


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Bounds of a figure, in bytes; ``expected`` is the measurement itself."""

    low: int
    expected: int
    high: int

    def straddles(self, limit: int) -> bool:
        """Whether a limit lies between the bounds, so that a verdict of it is only likely."""
        return self.low <= limit < self.high

    def shifted(self, size: int) -> Spread:
        """Return the bounds of a figure that contains ``size`` bytes more, of which nothing is assumed."""
        return Spread(low=self.low + size, expected=self.expected + size, high=self.high + size)


# By the name of a note: the least and the most that a card needed, divided by the dry figure, in the measured runs that
# made this assumption (docs/explanation/accuracy.md), rounded outwards: first of reserved, then of allocated memory. A
# note that is not here has no measured run beside it, and adds nothing. A name with "(" stands for all that begin so.
_SEEN = {
    "cudaMallocAsync": ((0.98, 1.02), (1.0, 1.0)),
    "cuDNN weight gradients in fp32": ((1.0, 1.16), (1.0, 1.003)),  # the most is VGG-16's after one step
    "cuDNN plans were timed (cudnn.benchmark)": ((0.99, 1.01), (1.0, 1.001)),
    "cuDNN execution plans": ((1.0, 1.85), (1.0, 1.85)),
    "cuSOLVER (": ((1.0, 1.6), (1.0, 1.31)),
    "cuFFT (": ((1.0, 1.15), (1.0, 1.15)),
}


def spread_of(size: int, notes: Iterable[Note], *, allocated: bool = False) -> Spread | None:
    """Return the bounds of a figure that rests on ``notes``.

    Args:
        size: the figure in bytes: reserved memory, or all that is held on a card without the context.
        notes: the assumptions behind it. What two of them may change is multiplied. Blocks that streams share add
            their bytes: torch counts them as reserved, but no longer as allocated.
        allocated: the figure is that of allocated memory instead.

    Returns:
        ``None`` when no measured run tells how far off one of them may be.
    """
    assumed = [note for note in notes if note.figures]
    names = [note.name for note in assumed]
    more = 0 if allocated else max(map(shared_blocks.bytes_more, assumed), default=0)
    found = [
        bounds[allocated]
        for name, bounds in _SEEN.items()
        if any(n == name or (name.endswith("(") and n.startswith(name)) for n in names)
    ]
    if all(bounds == (1.0, 1.0) for bounds in found) and not more:
        return None
    low = high = 1.0
    for least, most in found:
        low, high = low * least, high * most
    # Thousandths are rounded first, because 1000 * 1.003 is a little less than 1003 in floating point.
    return Spread(low=math.floor(round(size * low, 3)), expected=size, high=math.ceil(round(size * high, 3)) + more)
