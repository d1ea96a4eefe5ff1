"""A budget: the limit of a test, the metric that it limits, and where it was declared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Metric = Literal["allocated", "reserved", "device"]
Scope = Literal["test", "call"]
Ranks = Literal["card", "each"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The memory that a test may use.

    Attributes:
        limit_bytes: the largest peak that passes; ``None`` for a budget that only limits leaks or asks for free memory.
        metric: ``allocated`` (live blocks), ``reserved`` (what the allocator holds) or ``device`` (with the context).
        scope: ``test`` counts what fixtures hold as well, ``call`` only what the test itself adds.
        device: index of the device, ``None`` for the worst of the visible ones.
        enforce: cap the allocator, so that the line of code that breaks the budget raises an error.
        max_leak_bytes: the memory that the test may leave allocated; ``None`` does not check it.
        min_free_bytes: skip the test when the device has less free than this.
        max_host_bytes: the largest peak of host memory that passes; ``None`` does not measure it.
        ranks: what is held against the limit when a test has several processes: ``card`` adds up those that share a
            card at the same time, ``each`` takes every process by itself.
        search: under ``@given``, let hypothesis look for the example with the largest peak.
        origin: ``"marker"``, ``"ini"``, ``"cli"`` or ``"phase"``, with the location in ``where``.
    """

    limit_bytes: int | None
    metric: Metric = "allocated"
    scope: Scope = "test"
    device: int | None = None
    enforce: bool = False
    max_leak_bytes: int | None = None
    min_free_bytes: int | None = None
    max_host_bytes: int | None = None
    search: bool = False
    ranks: Ranks = "card"
    origin: str = "marker"
    where: str = ""

    @property
    def only_host(self) -> bool:
        """Whether the budget limits host memory and asks nothing of a device."""
        asked = (self.limit_bytes, self.max_leak_bytes, self.min_free_bytes)
        return self.max_host_bytes is not None and all(limit is None for limit in asked)
