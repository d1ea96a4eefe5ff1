"""The maximum of each metric over one interval, in whole bytes; ``None`` means that the probe does not report it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The maximum of each metric over one interval. The maxima need not fall on the same moment."""

    requested_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    device_bytes: int | None = None
