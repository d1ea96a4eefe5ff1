"""Measures one test, from before its first fixture to after its call."""

from __future__ import annotations

import contextlib
import gc
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_vram.drygpu.cards import context_notes
from pytest_vram.errors import VramBudgetExceeded
from pytest_vram.memory import Budget, Exceeded, Measurement, Peak, Phase, merged
from pytest_vram.plugin.failure import budget_message
from pytest_vram.plugin.figures import PhasePeak
from pytest_vram.plugin.ranks import held, unknown
from pytest_vram.plugin.ranks import since as started_since
from pytest_vram.plugin.verdicts import Measured, judge
from pytest_vram.probe.intervals import larger
from pytest_vram.probe.replay import HELD_BEFORE
from pytest_vram.probe.reporter import now

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_vram.memory import Device, Holder, Note, Process, Work
    from pytest_vram.plugin.figures import Share
    from pytest_vram.probe.children import Children
    from pytest_vram.probe.intervals import Interval, Intervals
    from pytest_vram.probe.protocol import Counters, Probe

_HOLDERS = 30  # holders kept in a report; the terminal shows fewer


class Meter:
    """Measures one run of one test.

    Attributes:
        fixtures: the shares of the fixtures that the test uses.
        others: bytes on each device that are held by fixtures which this test does not use.
        residue: bytes on each device that earlier tests left behind; they do not count against this test.
        started: ids (PIDs) of the processes that the test's fixtures started; they count for the test.
        worst: peaks and arguments of the worst hypothesis example; ``None`` before the first example.
    """

    def __init__(
        self,
        probe: Probe,
        intervals: Intervals,
        budget: Budget | None,
        residue: tuple[int, ...],
        top: int,
        *,
        timeline: bool = False,
        children: Children | None = None,
    ) -> None:
        self.children = children
        self._earlier = {process.pid for process in children.look(ask=False)} if children is not None else set()
        self.probe, self.intervals, self.budget, self.top, self.timeline = probe, intervals, budget, top, timeline
        self.residue = residue
        self.worst: tuple[tuple[Peak, ...], str] | None = None
        self.unknown_phase: str | None = None  # why a phase could not be compared with its budget
        if budget is not None and budget.metric != "allocated":
            probe.release()  # the allocator's cache from earlier tests does not count against this one
        probe.begin_test(record=budget is not None, timeline=timeline)
        self.began = time.perf_counter()
        self.began_at = self.call_began_at = now()
        self.start = probe.allocated()
        self.interval = intervals.begin()
        self.call_interval: Interval | None = None
        self.call_start = self.start
        self.counters = probe.counters()
        self.phases: list[tuple[Phase, tuple[Peak, ...], tuple[int, ...], tuple[Work | None, ...]]] = []
        self._open: list[str] = []
        self._notes: dict[Note, None] = {}
        self.fixtures: tuple[Share, ...] = ()
        self.others: tuple[int, ...] = ()
        self.started: frozenset[int] = frozenset()

    def begin_call(self) -> None:
        """Begin to measure the call, once the fixtures are set up."""
        self.call_start, self.call_began_at = self.probe.allocated(), now()
        self.call_interval = self.intervals.begin()

    @contextlib.contextmanager
    def phase(self, name: str, limit: int | None) -> Iterator[None]:
        """Measure a phase; see :meth:`pytest_vram.plugin.fixtures.Vram.measure`."""
        start, parent = self.probe.allocated(), self._open[-1] if self._open else None
        interval, begin, began_at = self.intervals.begin(), time.perf_counter() - self.began, now()
        self._open.append(name)
        failed = True
        before = self.probe.counters()
        try:
            yield
            failed = False
        finally:
            after = self.probe.counters()
            self._open.pop()
            peaks = self.intervals.end(interval)
            phase = Phase(
                name=name,
                start=begin,
                end=time.perf_counter() - self.began,
                peak=_largest(peaks),
                parent=parent,
                limit_bytes=limit,
            )
            self.phases.append((phase, peaks, _filled(start, len(peaks)), _work(before, after, len(peaks))))
            if not failed and limit is not None:
                self._check_phase(phase, peaks, limit, began_at)

    def phase_peaks(self, name: str) -> list[PhasePeak]:
        """Return the peaks of the phases of that name, each on the device with the most allocated bytes."""
        found = []
        for phase, peaks, start, work in self.phases:
            if phase.name == name:
                index = _fullest(peaks)
                found.append(PhasePeak.of(phase.peak, start[index] if start else 0, work[index] if work else None))
        return found

    def phase_names(self) -> list[str]:
        """Return the names of the finished phases, in order."""
        return list(dict.fromkeys(phase.name for phase, *_ in self.phases))

    def peak_so_far(self) -> PhasePeak:
        """Return the whole test's peak so far."""
        peaks = self.intervals.read(self.interval)
        work = _work(self.counters, self.probe.counters(), len(peaks))
        return PhasePeak.of(_largest(peaks), max(self.start, default=0), work[_fullest(peaks)] if work else None)

    def clean(self) -> None:
        """Free garbage and the allocator's cache, so that the next phase starts as the first one did."""
        gc.collect()
        self.probe.release()

    @contextlib.contextmanager
    def example(self, arguments: str) -> Iterator[None]:
        """Measure one hypothesis example by itself, and compare it with the budget.

        Raises:
            VramBudgetExceeded: if the example needed too much; hypothesis then looks for the smallest such example.
        """
        if self.probe.allocated() > self.call_start:
            gc.collect()  # reference cycles that an earlier example left do not count for this one
        self._noted()
        # Each example has its own history, because only what was held at its own peak is of interest.
        self.probe.end_test()
        self.probe.begin_test(record=self.budget is not None, timeline=self.timeline)
        interval, began_at = self.intervals.begin(), now()
        try:
            yield
        finally:
            peaks = self.intervals.end(interval)
        if self.worst is None or self.figure(peaks) > self.figure(self.worst[0]):
            self.worst = (peaks, arguments)
        if self.budget is not None:
            if self.budget.search:
                from hypothesis import target

                target(float(self.figure(peaks)), label="vram")
            measured = self.measured(peaks, since=began_at)
            verdict = judge(self.budget, measured)
            if isinstance(verdict, Exceeded):
                error = self.exceeded(measured, verdict, example=arguments)
                error.judged = True
                raise error

    def figure(self, peaks: tuple[Peak, ...]) -> int:
        """Return the largest value of the budget's metric over the devices."""
        metric = "allocated" if self.budget is None else self.budget.metric
        return max((getattr(peak, f"{metric}_bytes") or 0 for peak in peaks), default=0)

    def measurements(self, peaks: tuple[Peak, ...] | None = None) -> tuple[Measurement, ...]:
        """Return what was measured so far, with one entry per device."""
        seen = self.intervals.read(self.interval) if peaks is None else peaks
        devices = self.probe.devices()
        start = _filled(self.start, len(devices))
        before, after = self.counters, self.probe.counters()
        contaminated = self.probe.contaminated()
        work = _work(before, after, len(devices))
        result = []
        for index, device in enumerate(devices):
            earlier = before[index] if index < len(before) else None
            now = after[index] if index < len(after) else None
            result.append(
                Measurement(
                    device=device,
                    peak=seen[index] if index < len(seen) else Peak(allocated_bytes=0, reserved_bytes=0),
                    start_bytes=start[index],
                    uncounted_bytes=self.not_ours(index),
                    phases=tuple(
                        replace(phase, peak=found[index], work=asked[index])
                        for phase, found, _, asked in self.phases
                        if index < len(found)
                    ),
                    fixtures=tuple(held for share in self.fixtures if (held := share.on(index))),
                    retries=(now.retries if now else 0) - (earlier.retries if earlier else 0),
                    ooms=(now.ooms if now else 0) - (earlier.ooms if earlier else 0),
                    host_reads=self.probe.host_reads() if index == 0 else (),
                    contaminated=contaminated[index],
                    notes=merged([*self._noted(), *self._of_context(device)]),
                    work=work[index],
                )
            )
        return tuple(result)

    def detailed(self, measurements: tuple[Measurement, ...]) -> tuple[Measurement, ...]:
        """Return the measurements with memory over time and the holders of the peak, which take a while to read."""
        return tuple(
            replace(
                m,
                holders=self.probe.holders(m.device.index, max(self.top, _HOLDERS)),
                timeline=self.probe.timeline(m.device.index),
            )
            for m in measurements
        )

    def _noted(self) -> tuple[Note, ...]:
        """Return every assumption since the test began; they are kept here because each example resets the probe's."""
        self._notes.update(dict.fromkeys(self.probe.notes()))
        return merged(self._notes)

    def _of_context(self, device: Device) -> tuple[Note, ...]:
        """Return how far the context can be trusted, which only a budget for all that a dry card holds counts."""
        counts = device.kind == "dry" and self.budget is not None and self.budget.metric == "device"
        return context_notes(device.name) if counts else ()

    def processes(self, since: float | None = None) -> tuple[Process, ...]:
        """Return the child processes that used a GPU and count for the test.

        They started while the test ran, or a fixture that the test uses started them.

        Args:
            since: leave out processes that ended before this moment, in seconds since the machine started.
        """
        if self.children is None:
            return ()
        call = self.budget is not None and self.budget.scope == "call"
        found = [
            p
            for p in self.children.look()
            if (self.is_mine(p) and (not call or started_since(p, self.call_began_at)))
            or (p.pid in self.started and not call)
        ]
        return tuple(p for p in found if since is None or p.ended is None or p.ended >= since)

    def is_mine(self, process: Process) -> bool:
        """Return whether a process was started since this test began."""
        return process.pid not in self._earlier and started_since(process, self.began_at)

    def measured(self, peaks: tuple[Peak, ...] | None = None, *, since: float | None = None) -> Measured:
        """Return what was measured so far, for a verdict.

        Args:
            peaks: the peaks to judge, with one entry per device; without it, those of the whole test.
            since: count only processes that ran at this moment or later, in seconds since the machine started.
        """
        measurements = self.measurements(peaks)
        return Measured(
            measurements=measurements,
            counted=tuple(None if self.budget is None else self.counted(m) for m in measurements),
            not_ours=tuple(self.not_ours(m.device.index) for m in measurements),
            processes=self.processes(since),
        )

    def counted(self, measurement: Measurement) -> int | None:
        """Return the figure that is compared with the budget, in bytes."""
        assert self.budget is not None
        if self.budget.scope == "test" or self.call_interval is None:
            return measurement.figure(self.budget.metric)
        index = measurement.device.index
        peaks = self.intervals.read(self.call_interval)
        value = getattr(peaks[index] if index < len(peaks) else Peak(), f"{self.budget.metric}_bytes")
        return None if value is None else max(0, value - _filled(self.call_start, index + 1)[index])

    def not_ours(self, index: int) -> int:
        """Return the bytes that were held all along, by earlier tests and by fixtures that this test does not use."""
        start = _filled(self.start, index + 1)[index]
        return min(start, _filled(self.residue, index + 1)[index] + _filled(self.others, index + 1)[index])

    def exceeded(self, measured: Measured, verdict: Exceeded, *, example: str | None = None) -> VramBudgetExceeded:
        """Return the error of a broken budget."""
        budget = self.budget
        assert budget is not None
        assert budget.limit_bytes is not None
        limit = budget.limit_bytes
        peak = limit + verdict.over_bytes
        card = measured.cards(budget)[0]
        measurement, holders = card.worst, card.worst.holders[: self.top]
        if card.process is None:
            if example is None:  # hypothesis tries many examples, and a timeline takes a while to read
                measurement = replace(measurement, timeline=self.probe.timeline(measurement.device.index))
            holders = self.counted_holders(measurement)
        message = budget_message(
            budget,
            limit,
            peak,
            measurement,
            phase=None,
            holders=holders,
            example=example,
            peak_phase=verdict.phase,
            processes=measured.processes,
            card=card,
        )
        return VramBudgetExceeded(message, limit_bytes=limit, peak_bytes=peak, phase=verdict.phase)

    def _check_phase(self, phase: Phase, peaks: tuple[Peak, ...], limit: int, began_at: float) -> None:
        """Compare a phase with its limit; a child process that ran in the phase counts with its whole peak.

        Raises:
            VramBudgetExceeded: if the phase needed more than its limit.
        """
        budget = self.budget or Budget(limit_bytes=limit)
        measurements, processes = self.measurements(), self.processes(began_at)

        def counted(measurement: Measurement) -> int | None:
            index = measurement.device.index
            value = getattr(peaks[index] if index < len(peaks) else Peak(), f"{budget.metric}_bytes")
            return None if value is None else max(0, value - self.not_ours(index))

        found = [card for card in held(budget, measurements, processes, counted) if card.size_bytes is not None]
        value = (found[0].size_bytes or 0) if found else 0
        if value > limit:
            measurement = found[0].worst
            mine = found[0].process is None
            holders = self.counted_holders(measurement) if mine else measurement.holders[: self.top]
            phase_budget = replace(budget, origin="phase", where="")
            message = budget_message(
                phase_budget,
                limit,
                value,
                measurement,
                phase=phase.name,
                holders=holders,
                processes=processes,
                card=found[0],
            )
            raise VramBudgetExceeded(message, limit_bytes=limit, peak_bytes=value, phase=phase.name)
        if (missing := unknown(processes)) is not None:
            self.unknown_phase = f"in phase {phase.name!r} {missing}"

    def counted_holders(self, measurement: Measurement) -> tuple[Holder, ...]:
        """Return the holders of the peak, without the bytes that do not count against this test."""
        found = []
        for holder in self.probe.holders(measurement.device.index, self.top + 1):
            if holder.location == HELD_BEFORE:
                holder = replace(holder, size_bytes=holder.size_bytes - measurement.uncounted_bytes)
            if holder.size_bytes > 0:
                found.append(holder)
        return tuple(sorted(found, key=lambda holder: -holder.size_bytes)[: self.top])


def _largest(peaks: tuple[Peak, ...]) -> Peak:
    result = Peak()
    for peak in peaks:
        result = larger(result, peak)
    return result


def _fullest(peaks: tuple[Peak, ...]) -> int:
    """Return the index of the device that held most."""
    return max(range(len(peaks)), key=lambda index: peaks[index].allocated_bytes or 0, default=0)


def _work(before: Sequence[Counters], after: Sequence[Counters], count: int) -> tuple[Work | None, ...]:
    """Return the work that each of ``count`` devices did between two readings, or None where it is not counted."""
    found: list[Work | None] = []
    for index in range(count):
        now = after[index].work if index < len(after) else None
        earlier = before[index].work if index < len(before) else None
        found.append(now if now is None or earlier is None else now - earlier)
    return tuple(found)


def _filled(values: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return ``values`` with a 0 for each device that was not in use yet."""
    return values + (0,) * (count - len(values))
