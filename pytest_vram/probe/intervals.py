"""Measure the peaks of nested intervals with the single peak counter of a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_vram.memory import Peak

if TYPE_CHECKING:
    from pytest_vram.probe.protocol import Probe

_METRICS = ("requested_bytes", "allocated_bytes", "reserved_bytes", "device_bytes")


class Interval:
    """One interval: the largest value of each metric so far, for each device."""

    __slots__ = ("peaks",)

    def __init__(self, count: int) -> None:
        self.peaks: tuple[Peak, ...] = (Peak(),) * count


class Intervals:
    """Opens and closes intervals over one probe.

    When an interval opens, the probe's counter is reset. Before that, its value is merged into the peak of every open
    interval. The same happens when the program under test resets the counter itself.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._open: list[Interval] = []
        probe.on_reset(self.fold)

    def begin(self) -> Interval:
        """Open an interval inside the intervals that are open."""
        self.fold()
        self._probe.reset_peak()
        interval = Interval(len(self._probe.devices()))
        self._open.append(interval)
        return interval

    def end(self, interval: Interval) -> tuple[Peak, ...]:
        """Close an interval, and return its peak on each device."""
        self.fold()
        if interval in self._open:
            self._open.remove(interval)
        return interval.peaks

    def read(self, interval: Interval) -> tuple[Peak, ...]:
        """Return the interval's peak so far, on each device."""
        self.fold()
        return interval.peaks

    def fold(self) -> None:
        """Merge the probe's peak into every open interval."""
        if not self._open:
            return
        now = self._probe.peak()
        for interval in self._open:
            seen = interval.peaks + (Peak(),) * (len(now) - len(interval.peaks))
            interval.peaks = tuple(larger(a, b) for a, b in zip(seen, now, strict=False))


def larger(a: Peak, b: Peak) -> Peak:
    """Return the larger value of each metric. If only one of the two reports a metric, its value is taken."""
    values: dict[str, int | None] = {}
    for metric in _METRICS:
        known = [v for v in (getattr(a, metric), getattr(b, metric)) if v is not None]
        values[metric] = max(known) if known else None
    return Peak(**values)
