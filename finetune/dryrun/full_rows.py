"""The sequences of a dry run: as many as a step has, each as long as the settings allow, every token a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finetune.data.batches import Batch
from finetune.data.encode import IGNORED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class FullRows:
    """Sequences of one length."""

    count: int
    tokens: int
    """Tokens of a sequence."""
    vocabulary: int
    packed: int = 1
    """Rows that share a sequence, as --packing puts them there."""

    def sequence_lengths(self) -> NDArray[Any]:
        """Return the tokens of each sequence."""
        return np.full(self.count, self.tokens)

    def batch(self, sequences: Sequence[int]) -> Batch:
        """Return the sequences of these numbers as one micro-batch [b, tokens]. They hold the same kind of tokens."""
        shape = (len(sequences), self.tokens)
        ids = (torch.arange(shape[0] * shape[1]) % self.vocabulary).view(shape)
        labels, positions = ids.clone(), None
        if 1 < self.packed <= self.tokens:
            positions = (torch.arange(self.tokens) % -(-self.tokens // self.packed)).expand(shape)
            labels = labels.masked_fill(positions == 0, IGNORED)  # the first token of a row is no target
        return Batch(input_ids=ids, labels=labels, position_ids=positions)
