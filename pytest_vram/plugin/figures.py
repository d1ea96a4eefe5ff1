"""Figures that the plugin's parts hand to one another, and to a test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_vram.memory import FixtureShare

if TYPE_CHECKING:
    from pytest_vram.memory import Peak


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePeak:
    """Peak of a phase or of the test so far, in bytes; ``None`` where the device does not report it.

    Attributes:
        allocated: bytes in live blocks.
        reserved: bytes that the allocator held from the driver.
        requested: bytes that were asked for, before rounding.
        device: bytes that the process held on the card.
        start: allocated bytes when it began.
    """

    allocated: int | None
    reserved: int | None
    requested: int | None
    device: int | None
    start: int

    @property
    def added(self) -> int | None:
        """What the phase needed on top of what was held when it began."""
        return None if self.allocated is None else self.allocated - self.start

    @classmethod
    def of(cls, peak: Peak, start: int) -> PhasePeak:
        """From a probe's figures."""
        return cls(
            allocated=peak.allocated_bytes,
            reserved=peak.reserved_bytes,
            requested=peak.requested_bytes,
            device=peak.device_bytes,
            start=start,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a fixture added when it was set up, in bytes by device."""

    name: str
    scope: str
    sizes: tuple[int, ...]

    def on(self, index: int) -> FixtureShare | None:
        """The share of device ``index``; ``None`` where the fixture holds nothing."""
        size = self.sizes[index] if index < len(self.sizes) else 0
        return FixtureShare(name=self.name, scope=self.scope, size_bytes=size) if size > 0 else None
