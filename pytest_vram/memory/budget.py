"""A budget: a limit, the metric it is held against, and where it was declared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Metric = Literal["allocated", "reserved", "device"]
Scope = Literal["test", "call"]
Ranks = Literal["card", "each"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a test may use.

    Attributes:
        limit_bytes: the largest peak that passes; ``None`` for a budget that only limits leaks or asks for free memory.
        metric: ``allocated`` (live blocks), ``reserved`` (what the allocator holds) or ``device`` (with the context).
        scope: ``test`` counts what fixtures hold as well, ``call`` only what the test itself adds.
        device: index of the device, ``None`` for the worst of the visible ones.
        enforce: cap the allocator, so that the line that breaks the budget raises.
        max_leak_bytes: what the test may leave behind; ``None`` does not check.
        min_free_bytes: skip the test when the device has less free than this.
        ranks: what is held against the limit where a test has several processes: ``card`` takes all that lived on one
            card at the same time together, ``each`` takes every process by itself.
        search: under ``@given``, make the peak hypothesis's target.
        origin: ``"marker"``, ``"ini"``, ``"cli"`` or ``"phase"``, with the location in ``where``.
    """

    limit_bytes: int | None
    metric: Metric = "allocated"
    scope: Scope = "test"
    device: int | None = None
    enforce: bool = False
    max_leak_bytes: int | None = None
    min_free_bytes: int | None = None
    search: bool = False
    ranks: Ranks = "card"
    origin: str = "marker"
    where: str = ""
