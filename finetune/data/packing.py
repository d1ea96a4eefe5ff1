"""Decides which rows share a sequence, for ``--packing``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_PACKING = 3  # part of the generator's seed: see finetune.data.batches
_OPEN = 64
"""Number of sequences that are open for further rows at one time. With this number sequences are filled well, and the
search for room is quick."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """The rows of each sequence, in two arrays that take at most 16 bytes per row."""

    rows: NDArray[np.int64]
    """[rows]: the number of every row, once; the rows of a sequence are next to each other."""
    starts: NDArray[np.int64]
    """[sequences]: the position in ``rows`` at which each sequence begins."""

    @classmethod
    def one_each(cls, count: int) -> Sequences:
        """Put every row into a sequence of its own."""
        return cls(rows=np.arange(count), starts=np.arange(count))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        end = self.starts[number + 1] if number + 1 < len(self.starts) else None
        return self.rows[self.starts[number] : end]


def pack(lengths: NDArray[np.int32], room: int, *, seed: int) -> Sequences:
    """Put rows into sequences of at most ``room`` tokens. Each row stays whole and is in exactly one sequence.

    The rows are shuffled, and each goes into the first open sequence that has room for it. The seed alone decides the
    result; the shuffle keeps neighbours in the file, which are often alike, from sharing a sequence.

    Args:
        lengths: tokens of each row, none above ``room``.
        room: most tokens of a sequence.
        seed: seed of the shuffle.
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


def lengths_of_rows(position_ids: Tensor) -> tuple[int, ...]:
    """Return the tokens of each row of packed sequences, one after the other.

    A row begins with each sequence, and wherever a position does not follow the one before it.

    Args:
        position_ids: int64 [b, t], positions that start anew with every row.
    """
    import torch

    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    starts: list[int] = begins.flatten().nonzero()[:, 0].tolist()
    return tuple(end - start for start, end in zip(starts, [*starts[1:], position_ids.numel()], strict=True))
