"""What a probe answers that knows nothing but how much memory there is: a base to build others on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_vram.probe.protocol import Counters

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_vram.memory import Device, Holder, HostRead, Note, Timeline


class PlainProbe:
    """Everything of a :class:`~pytest_vram.probe.protocol.Probe` but the figures themselves.

    A subclass has ``kind``, ``devices``, ``allocated``, ``peak`` and ``reset_peak``, and what else it knows better.
    """

    def devices(self) -> tuple[Device, ...]:
        """To be given by the subclass."""
        raise NotImplementedError

    def on_reset(self, before: Callable[[], None]) -> None:
        """Resets by the program under test are not seen, or there are none."""

    def counters(self) -> tuple[Counters, ...]:
        """No such events are counted."""
        return (Counters(),) * len(self.devices())

    def free_bytes(self, index: int) -> int | None:
        """Unknown."""
        return None

    def contaminated(self) -> tuple[bool, ...]:
        """Never: this process alone is counted."""
        return (False,) * len(self.devices())

    def begin_test(self, *, record: bool, timeline: bool = False) -> None:
        """Nothing is recorded."""

    def end_test(self) -> None:
        """Nothing to stop."""

    def holders(self, index: int, top: int) -> tuple[Holder, ...]:
        """Unknown."""
        return ()

    def left(self, index: int, top: int) -> tuple[Holder, ...]:
        """Unknown."""
        return ()

    def timeline(self, index: int) -> Timeline | None:
        """Memory over time is not recorded."""
        return None

    def host_reads(self) -> tuple[HostRead, ...]:
        """The device computes."""
        return ()

    def notes(self) -> tuple[Note, ...]:
        """No assumption is made."""
        return ()

    def settle(self) -> None:
        """Nothing is known to be kept for later."""

    def release(self) -> None:
        """No cache is known."""

    def cap(self, index: int, limit_bytes: int | None) -> bool:
        """Cannot be done."""
        return limit_bytes is None
