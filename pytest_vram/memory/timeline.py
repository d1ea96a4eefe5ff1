"""Memory over time: the bytes held at each moment, by category and by module."""

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
"""The purpose of an allocation.

``quantization`` is scales and code books. ``logits`` is what the output layer and the loss allocate. ``temporary`` is
freed within the forward or backward pass that allocated it. ``other`` is what no module, optimizer or backward pass
allocated, such as inputs.
"""

CATEGORIES: tuple[Category, ...] = get_args(Category)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One named part of the memory: its bytes at each time of the timeline."""

    name: str
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Memory of one test on one device, reduced to the points that a drawing needs. The peak is exact.

    Attributes:
        times: seconds since the test's measurement began, ascending.
        allocated: bytes in live blocks, at each time.
        reserved: bytes that the allocator holds, at each time; empty if the probe does not report them.
        categories: the bytes of each :data:`Category` at each time; together they add up to ``allocated``.
        modules: the same bytes by the module that allocated them, in the order of size at the peak; small modules are
            in ``"other"``.
        peak_index: position of the allocated peak in ``times``.
        events: number of recorded allocations and frees.
        cut: whether the recording was full, so that the oldest events are missing from it.
        layout: the allocator's segments at the peak; ``None`` if the probe has no allocator with segments.
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
        """Return the allocated peak in bytes."""
        return self.allocated[self.peak_index] if self.allocated else 0

    def at_peak(self) -> dict[str, int]:
        """Return the bytes of each category at the peak, the largest first, without empty categories."""
        found = {series.name: series.sizes[self.peak_index] for series in self.categories}
        return dict(sorted(((n, size) for n, size in found.items() if size), key=lambda item: -item[1]))
