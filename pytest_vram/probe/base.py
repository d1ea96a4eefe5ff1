"""The base class of probes that measure only how much memory is allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_vram.probe.protocol import Counters

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_vram.memory import Device, Holder, HostRead, Note, Timeline


class PlainProbe:
    """Implements every method of :class:`~pytest_vram.probe.protocol.Probe` except those that measure.

    A subclass defines ``kind``, ``devices``, ``allocated``, ``peak`` and ``reset_peak``, and overrides the methods for
    which it has more information.
    """

    def devices(self) -> tuple[Device, ...]:
        """Return the devices; each subclass implements this."""
        raise NotImplementedError

    def on_reset(self, before: Callable[[], None]) -> None:
        """Do nothing: this probe does not notice resets by the program under test."""

    def counters(self) -> tuple[Counters, ...]:
        """Return zeros: this probe counts no events."""
        return (Counters(),) * len(self.devices())

    def free_bytes(self, index: int) -> int | None:
        """Return None: the free memory is unknown."""
        return None

    def contaminated(self) -> tuple[bool, ...]:
        """Return False: only this process is measured, so others do not matter."""
        return (False,) * len(self.devices())

    def begin_test(self, *, record: bool, timeline: bool = False) -> None:
        """Do nothing: this probe records no allocations."""

    def end_test(self) -> None:
        """Do nothing."""

    def holders(self, index: int, top: int) -> tuple[Holder, ...]:
        """Return nothing: allocations are not recorded."""
        return ()

    def left(self, index: int, top: int) -> tuple[Holder, ...]:
        """Return nothing: allocations are not recorded."""
        return ()

    def timeline(self, index: int) -> Timeline | None:
        """Return None: memory over time is not recorded."""
        return None

    def host_reads(self) -> tuple[HostRead, ...]:
        """Return nothing: the device computes its values."""
        return ()

    def notes(self) -> tuple[Note, ...]:
        """Return nothing: the figures rest on no assumption."""
        return ()

    def settle(self) -> None:
        """Do nothing: no library is known to keep workspaces on this device."""

    def release(self) -> None:
        """Do nothing: this probe knows of no cache."""

    def cap(self, index: int, limit_bytes: int | None) -> bool:
        """Return whether the request is to lift a cap: this probe cannot set one."""
        return limit_bytes is None
