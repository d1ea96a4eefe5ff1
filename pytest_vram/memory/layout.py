"""The allocator's segments at one moment: the parts that are in use, and the free parts between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["active", "pending", "free"]
"""A block is ``active`` if a tensor uses it, ``pending`` if it was freed and another stream may still use it, and
``free`` if the allocator can hand it out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Neighbouring blocks of a segment with the same properties: ``count`` blocks with ``size_bytes`` in total."""

    state: State
    size_bytes: int
    count: int = 1
    category: str | None = None
    location: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A piece of memory that the allocator got from the driver, or several that are identical.

    Sizes are those of one segment.

    Attributes:
        pool: ``small`` serves requests up to 1 MiB, ``large`` all others; a request is never served from the other.
        count: the number of segments that have the same size and the same blocks.
        largest_free_bytes: size of the largest free block.
        blocks: the number of blocks in the segment.
        expandable: whether the segment can grow (``expandable_segments:True``).
        private: whether the segment belongs to a private memory pool, such as that of a CUDA graph. Requests outside of
            the pool cannot use its free blocks.
        runs: the blocks in the order of their addresses. A segment with very many blocks lists only the first ones.
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
        """Return the bytes in free blocks."""
        return self.size_bytes - self.active_bytes - self.pending_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All segments of one device at one moment.

    Attributes:
        reserved_bytes: bytes in all segments.
        allocated_bytes: bytes in blocks that tensors use.
        pending_bytes: bytes in blocks that were freed and that another stream may still use.
        cached_bytes: bytes in segments without a block in use. The allocator returns such segments to the driver before
            it raises OutOfMemoryError.
        largest_free_bytes: the largest request that the allocator can serve without asking the driver.
        segment_count: the number of segments.
        segments: the largest segments; identical ones are listed once, with their ``count``.
        more_count: the number of segments that are not listed.
        more_bytes: the bytes in the segments that are not listed.
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
        """Return the bytes that are reserved and not allocated."""
        return self.reserved_bytes - self.allocated_bytes

    @property
    def fragmented_bytes(self) -> int:
        """Return the bytes in free blocks between blocks in use: too small for some requests, and not returnable."""
        return self.unused_bytes - self.pending_bytes - self.cached_bytes
