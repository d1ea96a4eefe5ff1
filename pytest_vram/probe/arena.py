"""Work out the size of the block behind each allocation in torch's memory history.

Torch's memory history records the size that was requested. The allocated memory is the size of the block: the request
is rounded up to 512 bytes, or as ``roundup_power2_divisions`` says. If the rest of a cached block would be too small,
or ``max_split_size_mb`` forbids splitting it, the whole block is used. This module applies the allocator's rules
(``round_size`` and ``should_split`` in c10/cuda/CUDACachingAllocator.cpp) to the recorded addresses.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

SMALL_REQUEST = 2**20
"""Requests of up to this many bytes come from small segments, where a block is always split."""
SMALLEST_REST = 2**20
"""In large segments, a block is not split if the rest has at most this many bytes."""
_ROUND = 512
_INTERVALS = 16  # ranges of sizes with their own roundup_power2_divisions: up to 2 MiB, up to 4 MiB, ...


class Arena:
    """The allocator's free blocks, updated with each event of the history.

    Args:
        settings: the entry ``"allocator_settings"`` of a snapshot; ``None`` takes the allocator's defaults.
    """

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        settings = settings or {}
        divisions = settings.get("roundup_power2_divisions") or {}
        self._divisions = [divisions.get(str(1 << i), 0) for i in range(_INTERVALS)] if divisions else []
        if not any(number > 1 for number in self._divisions):
            self._divisions = []
        most = settings.get("max_split_size", -1)
        self._max_split = most if most > 0 else sys.maxsize
        self._free: dict[int, tuple[int, int]] = {}  # address -> size, segment
        self._ends: dict[int, int] = {}  # end -> address
        self._given: dict[int, tuple[int, int]] = {}
        self._expandable = False

    def take_segment(self, segment: Mapping[str, Any]) -> dict[int, int]:
        """Add a segment of a snapshot.

        Returns:
            The size of each live block in it, by address.
        """
        live, address, key = {}, segment["address"], segment["address"]
        if segment.get("is_expandable"):
            self._expandable, key = True, 0
        for block in segment["blocks"]:
            address = block.get("address", address)
            if block["state"] == "inactive":
                self._add(address, block["size"], key)
            else:
                self._given[address] = (block["size"], key)
                if block["state"] == "active_allocated":
                    live[address] = block["size"]
            address += block["size"]
        return live

    def see(self, event: Mapping[str, Any]) -> int:
        """Apply one event of the history.

        Returns:
            The size of the block if the event is an ``alloc``, and 0 for any other event.
        """
        action, size = event["action"], event["size"]
        if action == "oom":  # nothing was allocated, so the event has no address
            return 0
        address = event["addr"]
        if action == "alloc":
            return self._give(address, size)
        if action == "free_completed" and address in self._given:
            self._add(address, *self._given.pop(address))
        elif action == "segment_alloc":
            self._add(address, size, address)
        elif action == "segment_map":
            self._expandable = True
            self._add(address, size, 0)
        elif action in ("segment_free", "segment_unmap"):
            self._cut_out(address, size)
        return 0

    def _give(self, address: int, asked: int) -> int:
        wanted = self._rounded(asked)
        if address not in self._free:
            self._given[address] = (wanted, address)
            return wanted
        size, segment = self._remove(address)
        rest = size - wanted
        tight = wanted <= SMALL_REQUEST or self._expandable
        if rest >= _ROUND if tight else rest > SMALLEST_REST and wanted < self._max_split:
            self._add(address + wanted, rest, segment)
            size = wanted
        self._given[address] = (size, segment)
        return size

    def _rounded(self, asked: int) -> int:
        if self._divisions and asked >= _ROUND:
            divisions = self._divisions[min(_INTERVALS - 1, max(0, asked.bit_length() - 21))]
            if divisions > 1 and asked > _ROUND * divisions:
                floor = 1 << (asked.bit_length() - 1)
                step = floor >> (divisions.bit_length() - 1)
                return asked if asked == floor else -(-asked // step) * step
        return max(_ROUND, -(-asked // _ROUND) * _ROUND)

    def _add(self, address: int, size: int, segment: int) -> None:
        """Add a free block, and join it with the free blocks next to it in the same segment."""
        before = self._ends.get(address)
        if before is not None and self._free[before][1] == segment:
            size += self._remove(before)[0]
            address = before
        after = self._free.get(address + size)
        if after is not None and after[1] == segment:
            size += self._remove(address + size)[0]
        self._free[address] = (size, segment)
        self._ends[address + size] = address

    def _remove(self, address: int) -> tuple[int, int]:
        size, segment = self._free.pop(address)
        del self._ends[address + size]
        return size, segment

    def _cut_out(self, address: int, size: int) -> None:
        """Remove memory that is returned to the driver: a whole segment, or a part of an expandable one."""
        around = next((start for start, (n, _) in self._free.items() if start <= address < start + n), None)
        if around is None:
            return
        whole, segment = self._remove(around)
        if around < address:
            self._add(around, address - around, segment)
        if around + whole > address + size:
            self._add(address + size, around + whole - address - size, segment)
