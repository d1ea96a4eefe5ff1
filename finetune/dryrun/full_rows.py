"""The rows of a dry run: as many as a step has, each as long as the settings allow, and every token a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finetune.data.batches import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class FullRows:
    """Rows of one length."""

    count: int
    tokens: int
    """Tokens of a row."""
    vocabulary: int

    def sequence_lengths(self) -> NDArray[Any]:
        """Return the tokens of each row."""
        return np.full(self.count, self.tokens)

    def batch(self, sequences: Sequence[int]) -> Batch:
        """Return the rows of these numbers as one micro-batch [rows, tokens]. They all hold the same kind of tokens."""
        shape = (len(sequences), self.tokens)
        ids = (torch.arange(shape[0] * shape[1]) % self.vocabulary).view(shape)
        return Batch(input_ids=ids, labels=ids.clone())
