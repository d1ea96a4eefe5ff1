"""What a probe is: the one thing the plugin asks about memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_vram.memory import Device, Holder, HostRead, Kind, Peak, Timeline, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Events on one device since the process began."""

    retries: int = 0
    """Times the allocator gave its cache back to satisfy a request."""
    ooms: int = 0
    """OutOfMemory errors that the allocator raised."""
    work: Work | None = None
    """Kernels, copies and waits; None where they are not counted."""


@runtime_checkable
class Probe(Protocol):
    """Reads memory of the devices that this process sees. Sequences have one entry a device, in the order of
    ``devices``.

    A probe starts nothing: asking it creates no context and imports no torch. A device that the process has not used
    yet reads as 0 bytes.
    """

    kind: Kind

    def devices(self) -> tuple[Device, ...]:
        """The devices, as they are visible to this process."""

    def allocated(self) -> tuple[int, ...]:
        """Bytes held now, in the probe's finest metric."""

    def peak(self) -> tuple[Peak, ...]:
        """Maxima since the last ``reset_peak``."""

    def reset_peak(self) -> None:
        """Let the maxima start again from what is held now."""

    def on_reset(self, before: Callable[[], None]) -> None:
        """Call ``before`` when somebody else is about to reset the peaks, so that nothing is lost."""

    def counters(self) -> tuple[Counters, ...]:
        """Events so far."""

    def free_bytes(self, index: int) -> int | None:
        """Bytes that device ``index`` could still give; ``None`` where unknown."""

    def contaminated(self) -> tuple[bool, ...]:
        """Whether another process's memory moved since the last ``reset_peak``."""

    def begin_test(self, *, record: bool, timeline: bool = False) -> None:
        """A test begins; ``record`` asks for what ``holders`` needs, ``timeline`` for categories over time as well."""

    def end_test(self) -> None:
        """The test is over."""

    def holders(self, index: int, top: int) -> tuple[Holder, ...]:
        """Who held memory on device ``index`` at the peak since ``begin_test``, the largest first.

        Empty where unknown.
        """

    def left(self, index: int, top: int) -> tuple[Holder, ...]:
        """What was allocated on device ``index`` since ``begin_test`` and is still there, the largest first.

        Empty where unknown.
        """

    def timeline(self, index: int) -> Timeline | None:
        """Memory of device ``index`` over time since ``begin_test``; ``None`` where it was not recorded."""

    def host_reads(self) -> tuple[HostRead, ...]:
        """Reads since ``begin_test`` of values that nothing computed; empty on devices that compute."""

    def settle(self) -> None:
        """Give back what libraries keep for later (BLAS workspaces): it is whose who asks for it next."""

    def release(self) -> None:
        """Give cached memory back to the device."""

    def cap(self, index: int, limit_bytes: int | None) -> bool:
        """Let allocations on device ``index`` fail beyond ``limit_bytes``.

        ``None`` lifts the cap. False: cannot be done.
        """
