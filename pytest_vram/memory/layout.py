"""What the allocator held at one moment, segment by segment: what is in use, and what is lost between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["active", "pending", "free"]
"""``active`` belongs to a tensor; ``pending`` was freed and still waits for another stream; ``free`` is cached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Neighbouring blocks of a segment that are alike: ``count`` of them, ``size_bytes`` together."""

    state: State
    size_bytes: int
    count: int = 1
    category: str | None = None
    location: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A piece of memory that the allocator got from the driver; sizes are those of one.

    Attributes:
        count: how many there are that are alike to the last block.
        pool: ``small`` for requests up to 1 MiB, ``large`` for all others; a block never comes from the other pool.
        expandable: grown piece by piece, instead of all at once.
        private: of a memory pool of its own, such as a CUDA graph's; nobody else gets its free blocks.
        largest_free_bytes: the largest request that it could still serve.
        blocks: how many it is split into.
        runs: its blocks by address; those of a segment split into very many may stop early.
    """

    pool: Literal["small", "large"]
    size_bytes: int
    count: int = 1
    active_bytes: int = 0
    pending_bytes: int = 0
    largest_free_bytes: int = 0
    blocks: int = 0
    expandable: bool = False
    private: bool = False
    runs: tuple[Run, ...] = ()

    @property
    def free_bytes(self) -> int:
        """Cached: neither a tensor's nor waiting."""
        return self.size_bytes - self.active_bytes - self.pending_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All segments of one device at one moment.

    Attributes:
        reserved_bytes: in all segments.
        allocated_bytes: in blocks of tensors.
        pending_bytes: in blocks that were freed and still wait for another stream.
        cached_bytes: in segments without any block in use, which the allocator gives back before it runs out.
        largest_free_bytes: the largest request that could be served without asking the driver.
        segment_count: how many segments there are.
        segments: the largest of them, those that are alike once; ``more_count`` with ``more_bytes`` are left out.
    """

    reserved_bytes: int
    allocated_bytes: int
    pending_bytes: int = 0
    cached_bytes: int = 0
    largest_free_bytes: int = 0
    segment_count: int = 0
    segments: tuple[Segment, ...] = ()
    more_count: int = 0
    more_bytes: int = 0

    @property
    def unused_bytes(self) -> int:
        """Reserved and not allocated."""
        return self.reserved_bytes - self.allocated_bytes

    @property
    def fragmented_bytes(self) -> int:
        """Free between blocks in use: lost to whatever does not fit there, and not to be given back."""
        return self.unused_bytes - self.pending_bytes - self.cached_bytes
