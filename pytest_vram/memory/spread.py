"""How far the figure of a card may lie from one that rests on assumptions, and what these bounds are taken from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pytest_vram.memory import shared_blocks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_vram.memory.note import Note


MEASURED = "as far off as measured runs with the same assumptions were"
SHARED = "with the blocks that streams share, if they lag behind"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Bounds of a figure, in bytes.

    Attributes:
        low: the lower bound.
        expected: the measurement itself.
        high: the upper bound.
        basis: what the bounds are taken from, worded so that it follows them after a comma.
    """

    low: int
    expected: int
    high: int
    basis: str = field(default=MEASURED, compare=False)

    def straddles(self, limit: int) -> bool:
        """Whether a limit lies between the bounds, so that a verdict of it is only likely."""
        return self.low <= limit < self.high

    def shifted(self, size: int) -> Spread:
        """Return the bounds of a figure that contains ``size`` bytes more, of which nothing is assumed."""
        return replace(self, low=self.low + size, expected=self.expected + size, high=self.high + size)


# By the names of notes: the least and the most that a card needed, divided by the dry figure, in the measured runs that
# made one of these assumptions (docs/explanation/accuracy.md), rounded outwards: first of reserved, then of allocated
# memory. A note that is not here has no measured run beside it, and adds nothing. A name with "(" stands for all that
# begin so.
_SEEN = {
    ("cudaMallocAsync",): ((0.98, 1.02), (1.0, 1.0)),
    # The most is VGG-16's after one step. A run that makes the second assumption makes the first one too.
    ("cuDNN convolutions", "cuDNN weight gradients in fp32"): ((1.0, 1.16), (1.0, 1.003)),
    ("cuDNN plans were timed (cudnn.benchmark)",): ((0.99, 1.01), (1.0, 1.001)),
    ("cuDNN execution plans",): ((1.0, 1.85), (1.0, 1.85)),
    ("cuSOLVER (",): ((1.0, 1.6), (1.0, 1.31)),
    ("cuFFT (",): ((1.0, 1.15), (1.0, 1.15)),
}


def spread_of(size: int, notes: Iterable[Note], *, allocated: bool = False) -> Spread | None:
    """Return the bounds of a figure that rests on ``notes``.

    Args:
        size: the figure in bytes: reserved memory, or all that is held on a card without the context.
        notes: the assumptions behind it. What two of them may change is multiplied. Blocks that streams share add
            their bytes: torch counts them as reserved, but no longer as allocated.
        allocated: the figure is that of allocated memory instead.

    Returns:
        ``None`` when nothing tells how far off one of them may be.
    """
    assumed = [note for note in notes if note.figures]
    names = [note.name for note in assumed]
    more = 0 if allocated else max(map(shared_blocks.bytes_more, assumed), default=0)
    found = [
        bounds[allocated]
        for known, bounds in _SEEN.items()
        if any(n == name or (name.endswith("(") and n.startswith(name)) for n in names for name in known)
    ]
    is_measured = any(bounds != (1.0, 1.0) for bounds in found)
    if not is_measured and not more:
        return None
    basis = ", and ".join([MEASURED] * is_measured + [SHARED] * bool(more))
    low = high = 1.0
    for least, most in found:
        low, high = low * least, high * most
    # Thousandths are rounded first, because 1000 * 1.003 is a little less than 1003 in floating point.
    return Spread(
        low=math.floor(round(size * low, 3)),
        expected=size,
        high=math.ceil(round(size * high, 3)) + more,
        basis=basis,
    )
