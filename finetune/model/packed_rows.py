"""Tells attention which tokens of packed sequences belong to one row, so that it needs no mask to keep rows apart.

A mask of packed rows has one entry for each pair of tokens of a sequence. The models of transformers ask for a mask
once in a forward pass and hand it to every layer, so that the few numbers of :class:`RowsMask` can go the same way. The
attention that reads them is in :mod:`finetune.kernels.packed_attention`.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from finetune.data.batches import Batch

ROWS_ATTRIBUTE = "finetune_rows"
"""Attribute of a model: how it is told about packed rows, a :data:`Way`."""

Way = Literal["mask", "rows", "lengths"]
"""How a model is told which tokens share a row.

mask: by positions alone, from which transformers makes a mask of every pair of tokens; rows: by :class:`RowsMask` in
the place of that mask; lengths: by the arguments that flash-attn's own attention in transformers takes.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """The rows of a batch of b sequences of t tokens, one after the other."""

    lengths: tuple[int, ...]
    """Tokens of each row. They add up to b * t; no row is in two sequences. Padding counts as rows of its own."""
    bounds: Tensor
    """int32 [rows + 1], on the model's device: the token at which each row begins, counted over the batch, and b * t"""

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> PackedRows:
        """Make the rows of a batch that is on ``device``. The host does not wait for the device."""
        bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        bounds[1:] = torch.tensor(lengths).cumsum(0)
        return cls(lengths=lengths, bounds=bounds.to(device, non_blocking=True))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsMask:
    """Stands for the mask of packed rows, on its way from the model to its attention layers."""

    rows: PackedRows
    window: tuple[int, int] | None
    """How many tokens before and after itself a token sees in its row, -1 for all. None if the model's mask is not of
    that form, as with attention in chunks."""
    of_one: Callable[[int], Any]
    """Makes the mask that the model would use for a row of so many tokens alone; None where it needs none."""


_CURRENT: ContextVar[PackedRows | None] = ContextVar("finetune_packed_rows", default=None)


def current_rows() -> PackedRows | None:
    """Return the packed rows of the forward pass that is running; None if its model is told in another way."""
    return _CURRENT.get()


@contextlib.contextmanager
def told_of_rows(way: Way, batch: Batch) -> Iterator[dict[str, Any]]:
    """Tell a model which tokens of a batch share a row, while it runs forward inside the ``with`` block.

    Args:
        way: how the model is told.
        batch: a batch on the model's device, whose mask is not given to the model.

    Yields:
        Arguments for the model's forward pass.
    """
    lengths = batch.row_lengths
    if way == "mask" or lengths is None or len(lengths) == len(batch.input_ids):
        yield {}
        return
    rows = PackedRows.of(lengths, batch.input_ids.device)
    if way == "lengths":
        ends = {f"cu_seq_lens_{side}": rows.bounds for side in "qk"}
        yield ends | {f"max_length_{side}": rows.longest for side in "qk"}
        return
    token = _CURRENT.set(rows)
    try:
        yield {}
    finally:
        _CURRENT.reset(token)
