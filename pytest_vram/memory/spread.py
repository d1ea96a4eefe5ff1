"""Bounds of a figure that rests on assumptions: what a card may need at least and at most, and how that is known."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pytest_vram.memory import shared_blocks
from pytest_vram.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_vram.memory.note import Note


MEASURED = "as far off as measured runs with the same assumptions were"
WORKSPACE = "if the largest workspace is off as it was in measured runs"
LIBRARY = "if the largest workspace that the library does not tell is as large as it may be"
SHARED = "with the blocks that streams share, if they are slower or faster than taken"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """How far off a figure may be for one kind of assumption.

    Attributes:
        names: the notes of this kind. A name with "(" stands for all that begin so.
        basis: what the rule is taken from.
        less: by how much a card may need less, as a multiple of the note's size.
        more: by how much it may need more, likewise.
        segments: how many segments of its own the workspace may take in reserved memory, because it finds no room in a
            cached block.
        share: what a card needed at least and at most, as shares of the figure itself; for reserved memory only. Such a
            rule does not use the note's size.
        allocated: whether allocated memory may be off, too.
    """

    names: tuple[str, ...]
    basis: str
    less: float = 0.0
    more: float = 0.0
    segments: int = 0
    share: tuple[float, float] = (1.0, 1.0)
    allocated: bool = True

    def is_of(self, note: Note) -> bool:
        return any(note.name == name or (name.endswith("(") and note.name.startswith(name)) for name in self.names)


# docs/explanation/accuracy.md has the measured runs. No run was measured for a note without a rule, which adds nothing.
_RULES = (
    # VGG-16's workspace of 107 MiB had 116.25 MiB on the card, and after one step the card held a segment more.
    _Rule(names=("cuDNN convolutions",), basis=WORKSPACE, less=0.09, more=0.09, segments=1),
    # R3D-18 without cuDNN's answers: allocated memory was 75 MiB too low and reserved memory 513 MiB, where the tensors
    # of the largest convolution have 205 MiB.
    _Rule(names=("cuDNN execution plans",), basis=WORKSPACE, more=1.1, segments=2),
    # ResNet-50 with cudnn.benchmark and without cuDNN's answers. A card allocates the largest workspace of all plans.
    _Rule(names=("cuDNN execution plans that were timed (cudnn.benchmark)",), basis=MEASURED, share=(1.0, 1.85)),
    # Where a kernel runs that keeps a whole layer on the card, its workspace may be anything up to twice what is taken.
    _Rule(names=("cuDNN recurrent layers",), basis=LIBRARY, less=1.0, more=1.0, segments=1),
    _Rule(names=("cuDNN dropout",), basis=LIBRARY, less=1.0, more=1.0, segments=1),
    _Rule(names=("cuDNN batch norm of channels_last",), basis=LIBRARY, more=1.0, segments=1),
    _Rule(names=("cuDNN CTC loss",), basis=LIBRARY, more=2.0, segments=1),
    _Rule(names=("cudaMallocAsync",), basis=MEASURED, share=(0.98, 1.02), allocated=False),
    # The eigenvectors of a batch of matrices need four times its size. The workspace of one matrix is computed, and may
    # be off by as much as itself.
    _Rule(names=("cuSOLVER (",), basis=LIBRARY, more=4.2, segments=1),
    _Rule(names=("cuSOLVER",), basis=LIBRARY, less=1.0, more=1.0, segments=1),
    _Rule(names=("cuFFT (",), basis=LIBRARY, more=2.0),
    _Rule(names=(shared_blocks.NAME,), basis=SHARED, less=1.0, more=1.0, allocated=False),
)


def spread_of(size: int, notes: Iterable[Note], *, allocated: bool = False) -> Spread | None:
    """Return the bounds of a figure that rests on ``notes``.

    Args:
        size: the figure in bytes: reserved memory, or all that is held on a card without the context.
        notes: the assumptions behind it. Of each kind the largest one counts, and the bounds of all kinds are added up.
        allocated: the figure is that of allocated memory instead.

    Returns:
        ``None`` if there is no rule for any of them.
    """
    assumed = [note for note in notes if note.figures]
    low = high = size
    bases: dict[str, None] = {}
    for rule in _RULES:
        sizes = [note.size_bytes for note in assumed if rule.is_of(note)]
        if not sizes or (allocated and not rule.allocated):
            continue
        less, more = _off(rule, size, max(sizes), allocated=allocated)
        low, high = low - less, high + more
        if less or more:
            bases[rule.basis] = None
    return Spread(low=max(low, 0), expected=size, high=high, basis=", and ".join(bases)) if bases else None


def _off(rule: _Rule, figure: int, about: int, *, allocated: bool) -> tuple[int, int]:
    """Return by how many bytes a card may need less and more, for an assumption about ``about`` bytes."""
    least, most = rule.share
    less = _whole(figure * (1 - least) + about * rule.less)
    more = _whole(figure * (most - 1) + about * rule.more)
    return less, more + (0 if allocated else rule.segments * _segment(_whole(about * (1 + rule.more))))


def _whole(size: float) -> int:
    """Return the next whole number of bytes. Thousandths are rounded first, because 0.09 is no exact binary number."""
    return math.ceil(round(size, 3))


def _segment(size: int) -> int:
    """Return the bytes that torch's allocator reserves for a block for which no cached block has room."""
    if size <= MIB:
        return 2 * MIB if size else 0
    return 20 * MIB if size < 10 * MIB else math.ceil(size / (2 * MIB)) * 2 * MIB
