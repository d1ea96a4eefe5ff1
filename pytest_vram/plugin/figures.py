"""Figures that the plugin's parts pass to one another and to tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_vram.memory import FixtureShare

if TYPE_CHECKING:
    from pytest_vram.memory import Peak, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePeak:
    """Peak and work of a phase or of the test so far; sizes in bytes, ``None`` where the device does not report it.

    Attributes:
        allocated: bytes in live blocks.
        reserved: bytes that the allocator held from the driver.
        requested: bytes that were asked for, before rounding.
        device: bytes that the process held on the card.
        start: allocated bytes when the phase or test began.
        work: kernels, copies and waits; ``None`` where the device does not count them, as a real card does not.
    """

    allocated: int | None
    reserved: int | None
    requested: int | None
    device: int | None
    start: int
    work: Work | None = None

    @property
    def launches(self) -> int | None:
        """The number of kernels that were launched."""
        return None if self.work is None else self.work.launches

    @property
    def synchronizations(self) -> int | None:
        """The number of times that the host waited for the device."""
        return None if self.work is None else self.work.synchronizations

    @property
    def copies_to_device(self) -> int | None:
        """The number of copies from host memory to the device."""
        return None if self.work is None else self.work.copies_to_device

    @property
    def copied_to_device_bytes(self) -> int | None:
        """The bytes that were copied to the device."""
        return None if self.work is None else self.work.copied_to_device_bytes

    @property
    def copies_to_host(self) -> int | None:
        """The number of copies from the device to host memory."""
        return None if self.work is None else self.work.copies_to_host

    @property
    def copied_to_host_bytes(self) -> int | None:
        """The bytes that were copied to host memory."""
        return None if self.work is None else self.work.copied_to_host_bytes

    @property
    def added(self) -> int | None:
        """The bytes that the phase needed on top of what was held when it began."""
        return None if self.allocated is None else self.allocated - self.start

    @classmethod
    def of(cls, peak: Peak, start: int, work: Work | None = None) -> PhasePeak:
        """Make the figures from those of a probe."""
        return cls(
            allocated=peak.allocated_bytes,
            reserved=peak.reserved_bytes,
            requested=peak.requested_bytes,
            device=peak.device_bytes,
            start=start,
            work=work,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a fixture added when it was set up, in bytes on each device."""

    name: str
    scope: str
    sizes: tuple[int, ...]

    def on(self, index: int) -> FixtureShare | None:
        """Return the share on device ``index``, or None if the fixture holds nothing there."""
        size = self.sizes[index] if index < len(self.sizes) else 0
        return FixtureShare(name=self.name, scope=self.scope, size_bytes=size) if size > 0 else None
