"""Keeps the parts of a sharded base in host memory. It is pinned, so that the host need not wait for copies."""

from __future__ import annotations

import torch

from finetune.errors import ConfigError, Problem
from finetune.model.host_copies import require_room
from pytest_vram.units import MIB

PIECE = 256 * MIB
"""Bytes that are pinned at a time. PyTorch rounds pinned memory up to a power of two, so that a weight of 9 MiB on its
own would take 16."""
_ALIGNED = 64


class HostParts:
    """Copies of tensors in host memory, which is taken in large pieces.

    A piece is given back when no copy in it is left. ``pinned`` is False without a card.

    Attributes:
        refused: the error of the first copy for which there was no room. Later copies raise it again.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self.refused: ConfigError | None = None

    def copy(self, values: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy of ``values`` in host memory, with the same shape and dtype.

        Raises:
            ConfigError: the host has no memory left for it.
        """
        room = -(-values.nbytes // _ALIGNED) * _ALIGNED
        if self._used + room > len(self._piece):
            self._piece, self._used = self._taken(max(PIECE, room)), 0
        begin = self._used
        self._used += room
        found = self._piece[begin : begin + values.nbytes].view(values.dtype).view(values.shape)
        return found.copy_(values)

    def _taken(self, size: int) -> torch.Tensor:
        if self.refused is not None:
            raise self.refused
        try:
            require_room(size)
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError as error:
            why = f"{size / MIB:,.0f} MiB of host memory cannot be pinned for a part of the base: {error}"
            self.refused = no_room(why)
            raise self.refused from error


def no_room(why: str) -> ConfigError:
    """Return the error of a host that cannot hold the parts of its ranks."""
    remedy = "use more ranks on more machines, or --no-offload-base, with which the parts stay on the cards"
    return ConfigError(Problem(field="offload_base", value=True, why=why, remedy=remedy))
