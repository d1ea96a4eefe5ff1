"""Which rows share a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PACKING = 3  # what the random generator is for: see finetune.data.batches
_OPEN = 64
"""Sequences that are kept open at one time: fills them well, and keeps the search short on millions of rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Rows put into sequences, in two arrays: a set of millions of rows costs 16 bytes each."""

    rows: NDArray[np.int64]
    """Every row once, the rows of a sequence next to each other."""
    starts: NDArray[np.int64]
    """Where in ``rows`` each sequence begins."""

    @classmethod
    def one_each(cls, count: int) -> Sequences:
        """Every row in a sequence of its own."""
        return cls(rows=np.arange(count), starts=np.arange(count))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        end = self.starts[number + 1] if number + 1 < len(self.starts) else None
        return self.rows[self.starts[number] : end]


def pack(lengths: NDArray[np.int32], room: int, *, seed: int) -> Sequences:
    """Put rows into sequences of at most ``room`` tokens, each row whole and in exactly one.

    First fit over shuffled rows, so that what shares a sequence is a matter of the seed alone; shuffled, because sorted
    rows would put like with like.

    Args:
        lengths: tokens of each row, none above ``room``.
        room: tokens of a sequence.
        seed: of the shuffle.

    Returns:
        The sequences, and the rows in the order in which they lie in each.
    """
    if not len(lengths):
        return Sequences.one_each(0)
    done: list[list[int]] = []
    free: list[int] = []
    held: list[list[int]] = []
    for row in np.random.default_rng([_PACKING, seed]).permutation(len(lengths)):
        length = int(lengths[row])
        place = next((i for i, left in enumerate(free) if left >= length), None)
        if place is None:
            if len(free) == _OPEN:
                fullest = min(range(_OPEN), key=free.__getitem__)
                done.append(held.pop(fullest))
                free.pop(fullest)
            free.append(room)
            held.append([])
            place = len(free) - 1
        free[place] -= length
        held[place].append(int(row))
    packed = [*done, *held]
    starts = np.cumsum([0, *(len(rows) for rows in packed[:-1])], dtype=np.int64)
    return Sequences(rows=np.array([row for rows in packed for row in rows], dtype=np.int64), starts=starts)
