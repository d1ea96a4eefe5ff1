"""Memory over time: what was held at each moment, by category and by module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pytest_vram.memory.layout import Layout

Category = Literal[
    "weights",
    "quantization",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "temporary",
    "other",
]
"""What an allocation is for.

``quantization`` are scales and code books; ``logits`` what the head and the loss make; ``temporary`` is freed within
the forward or backward pass that made it; ``other`` is what no module, optimizer or backward pass made: inputs, for
example.
"""

CATEGORIES: tuple[Category, ...] = get_args(Category)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One named part of the memory: bytes at each time of its timeline."""

    name: str
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Memory of one test on one device, thinned out for drawing; the peak is kept exactly.

    Attributes:
        times: seconds since the test's measurement began, ascending.
        allocated: bytes in live blocks, at each time.
        reserved: bytes that the allocator holds, at each time; empty where the probe reports none.
        categories: parts of ``allocated`` that add up to it, named as in :data:`Category`.
        modules: the same bytes by the module that allocated them, largest at the peak first; the rest is ``"other"``.
        peak_index: position of the allocated peak.
        events: allocations and frees that were recorded.
        cut: events that no longer fitted the record: what came before the first time is not shown.
        layout: the allocator's segments at the peak; ``None`` where there are none.
    """

    times: tuple[float, ...]
    allocated: tuple[int, ...]
    reserved: tuple[int, ...] = ()
    categories: tuple[Series, ...] = ()
    modules: tuple[Series, ...] = ()
    peak_index: int = 0
    events: int = 0
    cut: bool = False
    layout: Layout | None = None

    @property
    def peak_bytes(self) -> int:
        """The allocated peak."""
        return self.allocated[self.peak_index] if self.allocated else 0

    def at_peak(self) -> dict[str, int]:
        """Bytes by category at the peak, the largest first, empty ones left out."""
        found = {series.name: series.sizes[self.peak_index] for series in self.categories}
        return dict(sorted(((n, size) for n, size in found.items() if size), key=lambda item: -item[1]))
