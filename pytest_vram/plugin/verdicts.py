"""Judges a measured test by its budget, as a pure function of what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_vram.memory import Exceeded, Unmeasured, Within
from pytest_vram.plugin.ranks import at_most, held, unknown

if TYPE_CHECKING:
    from pytest_vram.memory import Budget, Measurement, Process, Verdict
    from pytest_vram.memory.process import CardNeed

UNTOUCHED = "the test never touched the device"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured of one test, as far as its budget needs it.

    Attributes:
        measurements: the measurements of the test's own process, with one entry per device.
        counted: the figure of each entry that is compared with the budget, in bytes; ``None`` where the device does
            not report the budget's metric.
        not_ours: the bytes of each entry that were held all along, and do not count against the test.
        processes: the child processes that count for the test.
    """

    measurements: tuple[Measurement, ...]
    counted: tuple[int | None, ...]
    not_ours: tuple[int, ...]
    processes: tuple[Process, ...] = ()

    def cards(self, budget: Budget) -> list[CardNeed]:
        """Return what counts against a budget, card by card, the largest first."""
        figures = {m.device.index: size for m, size in zip(self.measurements, self.counted, strict=True)}
        return held(budget, self.measurements, self.processes, lambda m: figures[m.device.index])


def judge(budget: Budget | None, measured: Measured) -> Verdict | None:
    """Return the verdict on a test, or None if it has no budget or its budget has no limit."""
    if budget is None or budget.limit_bytes is None:
        return None
    if all(budget.device not in (None, m.device.index) for m in measured.measurements):
        return Unmeasured(reason=f"there is no device {budget.device}; {len(measured.measurements)} visible")
    cards = measured.cards(budget)
    for card in cards:
        if card.size_bytes is None:
            return Unmeasured(reason=f"the kind {card.worst.device.kind} reports no {budget.metric} figure")
    peak, largest = cards[0].size_bytes or 0, cards[0]
    if largest.worst.contaminated:
        return Unmeasured(reason="another process's memory on the card moved during the test")
    if peak > budget.limit_bytes:
        phase = phase_of_peak(largest.worst, budget.metric) if largest.process is None else None
        return Exceeded(over_bytes=peak - budget.limit_bytes, phase=phase)
    if (missing := unknown(measured.processes)) is not None:
        most = at_most(measured.processes) if budget.metric in ("allocated", "reserved") else None
        if most is None or peak + most > budget.limit_bytes:
            return Unmeasured(reason=missing)
        return Within(headroom_bytes=budget.limit_bytes - peak - most)
    if peak == 0 and _untouched(budget, measured) and budget.origin != "ini":
        return Unmeasured(reason=UNTOUCHED)  # not for the ini file's budget: most tests never touch a device
    return Within(headroom_bytes=budget.limit_bytes - peak)


def phase_of_peak(measurement: Measurement, metric: str) -> str | None:
    """Return the innermost phase in which the peak occurred, or None if it occurred outside all phases."""
    peak = getattr(measurement.peak, f"{metric}_bytes")
    # Phases are listed in the order in which they end, so the innermost come first.
    return next((p.name for p in measurement.phases if getattr(p.peak, f"{metric}_bytes") == peak), None)


def _untouched(budget: Budget, measured: Measured) -> bool:
    return all(
        m.peak.allocated_bytes in (0, held_all_along)
        for m, held_all_along in zip(measured.measurements, measured.not_ours, strict=True)
        if budget.device in (None, m.device.index)
    )
