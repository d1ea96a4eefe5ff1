"""The interface of a probe, through which the plugin measures memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_vram.memory import Device, Holder, HostRead, Kind, Note, Peak, Timeline, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Events on one device since the process began."""

    retries: int = 0
    """The number of times that the allocator emptied its cache to satisfy a request."""
    ooms: int = 0
    """The number of OutOfMemory errors that the allocator raised."""
    work: Work | None = None
    """Kernels, copies and waits; ``None`` if they are not counted."""


@runtime_checkable
class Probe(Protocol):
    """Measures the memory of the devices that this process sees.

    A sequence has one entry for each device, in the order of ``devices``. A probe neither creates a CUDA context nor
    imports torch. A device that the process has not used yet has 0 bytes.
    """

    kind: Kind

    def devices(self) -> tuple[Device, ...]:
        """Return the devices that are visible to this process."""

    def allocated(self) -> tuple[int, ...]:
        """Return the bytes held now, in the probe's most precise metric."""

    def peak(self) -> tuple[Peak, ...]:
        """Return the peaks since the last ``reset_peak``."""

    def reset_peak(self) -> None:
        """Set the peaks to what is held now."""

    def on_reset(self, before: Callable[[], None]) -> None:
        """Call ``before`` each time that the program under test is about to reset the peaks."""

    def counters(self) -> tuple[Counters, ...]:
        """Return the number of events so far."""

    def free_bytes(self, index: int) -> int | None:
        """Return the bytes that can still be allocated on device ``index``; ``None`` if that is unknown."""

    def contaminated(self) -> tuple[bool, ...]:
        """Return whether another process's memory changed since ``begin_test``."""

    def begin_test(self, *, record: bool, timeline: bool = False) -> None:
        """Begin a test. ``record`` records allocations for ``holders``; ``timeline`` adds categories over time."""

    def end_test(self) -> None:
        """End the test and its recording."""

    def holders(self, index: int, top: int) -> tuple[Holder, ...]:
        """Return the ``top`` places in the code that held most on device ``index`` at the peak, the largest first.

        The peak is that since ``begin_test``. The result is empty if allocations were not recorded.
        """

    def left(self, index: int, top: int) -> tuple[Holder, ...]:
        """Return the ``top`` places whose allocations on device ``index`` since ``begin_test`` are still live.

        The largest is first. The result is empty if allocations were not recorded.
        """

    def timeline(self, index: int) -> Timeline | None:
        """Return the memory of device ``index`` over time since ``begin_test``; ``None`` if it was not recorded."""

    def host_reads(self) -> tuple[HostRead, ...]:
        """Return the values read back since ``begin_test`` from a dry GPU; empty on devices that compute."""

    def notes(self) -> tuple[Note, ...]:
        """Return the assumptions since ``begin_test`` that the figures or the recording rest on."""

    def settle(self) -> None:
        """Free the workspaces that BLAS libraries keep, so that the next test that needs one allocates it anew."""

    def release(self) -> None:
        """Return cached memory to the device."""

    def cap(self, index: int, limit_bytes: int | None) -> bool:
        """Let allocations on device ``index`` fail beyond ``limit_bytes``; ``None`` lifts the cap.

        Returns:
            Whether the probe can set the cap.
        """
