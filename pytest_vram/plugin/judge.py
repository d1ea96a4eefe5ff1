"""What a budget and a baseline say of a measured test, and how it is told."""

from __future__ import annotations

import json
import os
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram.errors import VramBudgetExceeded, VramError, VramLeak, VramRegression, VramUnmeasured
from pytest_vram.memory import Exceeded, TestRecord, Unmeasured
from pytest_vram.memory.codec import encode
from pytest_vram.plugin.failure import memory_section
from pytest_vram.plugin.meter import UNTOUCHED
from pytest_vram.plugin.ranks import CHILD_VARIABLE, PROPERTY, left_text
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_vram.memory import Budget, Measurement, Process, Verdict
    from pytest_vram.plugin.meter import Meter
    from pytest_vram.plugin.settings import Settings


class VramUnmeasuredWarning(pytest.PytestWarning):
    """A budgeted test ran, and its memory could not be measured."""


class Judge:
    """Raises what has to be raised, and publishes each test's record."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._baseline: Any = None

    def judge(self, item: pytest.Item, meter: Meter) -> None:
        """The test passed: hold it against its budget and its baseline.

        Raises:
            VramBudgetExceeded: it needed more than its budget.
            VramRegression: it needs more than it did.
            VramUnmeasured: nothing could be held against anything, and the session says that this is a failure.
        """
        __tracebackhide__ = True
        measurements = meter.measurements(meter.worst[0] if meter.worst else None)
        processes = meter.processes()
        verdict = meter.verdict(measurements, processes)
        if meter.unknown_phase is not None and not isinstance(verdict, Exceeded):
            verdict = Unmeasured(reason=meter.unknown_phase)
        skipped = self._skips(verdict) and CHILD_VARIABLE not in os.environ
        record = self.record(item, meter, measurements, "skipped" if skipped else "passed", verdict)
        if CHILD_VARIABLE in os.environ:
            return  # one rank of many: the budget is held where the ranks were started
        if isinstance(verdict, Exceeded):
            example = meter.worst[1] if meter.worst else None
            raise judged(meter.exceeded(measurements, verdict, processes, example=example))
        if isinstance(verdict, Unmeasured):
            self.say_unmeasured(item, verdict.reason, skip=skipped)
        self._compare(record)

    def judge_left(self, meter: Meter | None, left: Sequence[Process]) -> None:
        """Processes that the test left running count against ``max_leak_mb`` with what they hold.

        Raises:
            VramLeak: they hold more than the test may leave.
        """
        __tracebackhide__ = True
        limit = meter.budget.max_leak_bytes if meter is not None and meter.budget is not None else None
        held = sum(process.left_bytes or 0 for process in left)
        if limit is not None and held > limit:
            names = "".join(f"\n    {left_text(process)}" for process in left)
            raise judged(
                VramLeak(
                    f"the test left processes running that hold {format_bytes(held)} ({held:,} bytes), allowed are"
                    f" {format_bytes(limit)} (max_leak_mb){names}\n  try: end what the test starts, and wait for it",
                    limit_bytes=limit,
                    leaked_bytes=held,
                )
            )

    def _skips(self, verdict: Verdict | None) -> bool:
        """Whether a test that ran is skipped for its verdict.

        One that needs no device at all has kept to its budget, if to no purpose: it is only flagged.
        """
        unmeasured = isinstance(verdict, Unmeasured) and verdict.reason != UNTOUCHED
        return unmeasured and self.settings.on_unmeasured == "skip"

    def _compare(self, record: TestRecord) -> None:
        __tracebackhide__ = True
        if self.settings.baseline is None or self.settings.update_baseline:
            return
        from pytest_vram import baseline

        if self._baseline is None:
            self._baseline = baseline.read(self.settings.baseline)
        for change in baseline.compare_record(record, self._baseline, self.settings.tolerance_percent):
            if change.regressed:
                raise judged(
                    VramRegression(
                        change.message(self.settings.baseline),
                        baseline_bytes=change.before_bytes,
                        peak_bytes=change.after_bytes,
                        tolerance_percent=self.settings.tolerance_percent,
                    )
                )

    def record_failed(self, item: pytest.Item, meter: Meter, error: BaseException) -> None:
        """The test failed or was skipped by itself: keep its error, and add what it held."""
        if isinstance(error, pytest.skip.Exception):
            self.record(item, meter, meter.measurements(), "skipped", None)
            return
        if _mentions(error, VramBudgetExceeded):
            measurements = meter.measurements(meter.worst[0] if meter.worst else None)
            self.record(item, meter, measurements, "failed", meter.verdict(measurements, meter.processes()))
            return
        try:
            measurements = meter.measurements(meter.worst[0] if meter.worst else None)
            self.record(item, meter, measurements, "failed", None)
            _explain(item, meter, measurements, error)
        except Exception as trouble:  # whatever it is, the test's own error is what the user has to see
            item.add_report_section("call", "GPU memory", f"could not be read: {trouble!r}")

    def record(
        self,
        item: pytest.Item,
        meter: Meter,
        measurements: tuple[Measurement, ...],
        outcome: str,
        verdict: Verdict | None,
    ) -> TestRecord:
        """Make the test's record, and send it on its way to the report."""
        if meter.timeline or isinstance(verdict, Exceeded):
            measurements = meter.detailed(measurements)
        record = TestRecord(
            nodeid=item.nodeid,
            outcome="failed" if isinstance(verdict, Exceeded) else outcome,
            budget=meter.budget,
            measurements=measurements,
            verdict=verdict,
            worst_example=meter.worst[1] if meter.worst else None,
            processes=meter.processes(),
        )
        self._publish(item, record)
        return record

    def _publish(self, item: pytest.Item, record: TestRecord) -> None:
        item.user_properties[:] = [p for p in item.user_properties if p[0] != PROPERTY]
        item.user_properties.append((PROPERTY, json.dumps(encode(record), separators=(",", ":"))))
        item.ihook.pytest_vram_record(item=item, record=record)

    def not_measured(self, item: pytest.Item, budget: Budget, reason: str, *, outcome: str) -> None:
        """Record that a budgeted test cannot be measured, and skip it or fail, as the session says."""
        record = TestRecord(nodeid=item.nodeid, outcome=outcome, budget=budget, verdict=Unmeasured(reason=reason))
        self._publish(item, record)
        self.say_unmeasured(item, reason, skip=True)

    def say_unmeasured(self, item: pytest.Item, reason: str, *, skip: bool) -> None:
        """Apply the session's policy; without ``skip`` its default is to say nothing here: the summary does."""
        __tracebackhide__ = True
        policy = self.settings.on_unmeasured
        if policy == "fail":
            raise judged(VramUnmeasured(f"the budget could not be measured: {reason}"))
        if policy == "warn":
            warnings.warn(VramUnmeasuredWarning(f"{item.nodeid}: the budget was not measured: {reason}"), stacklevel=2)
        elif skip:
            raise pytest.skip.Exception(f"vram budget not measured: {reason}", _use_item_location=True)

    def refuse(self, text: str) -> None:
        """A fixture has nothing to give: skip, or fail where the session says so."""
        if self.settings.on_unmeasured == "fail":
            raise VramUnmeasured(text)
        raise pytest.skip.Exception(text, _use_item_location=True)


def _explain(item: pytest.Item, meter: Meter, measurements: tuple[Measurement, ...], error: BaseException) -> None:
    """Add what the test held, and, where it ran out of memory under a cap, whose cap that was."""
    budget = meter.budget
    measurement = max(measurements, key=lambda m: m.peak.allocated_bytes or 0, default=None)
    if measurement is None:
        return
    if measurement.peak.allocated_bytes or measurement.peak.device_bytes:
        holders = meter.counted_holders(measurement)
        item.add_report_section("call", "GPU memory", memory_section(measurement, holders))
    if budget is not None and budget.enforce and any(m.ooms for m in measurements):
        note = (
            f"vram: enforce=True capped the allocator at this test's budget of {format_bytes(budget.limit_bytes)}"
            f" ({budget.where})"
        )
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)


def judged(error: VramError) -> VramError:
    """Mark an error as this plugin's verdict, whose traceback nobody needs."""
    error.judged = True
    return error


def _mentions(error: BaseException, kind: type[BaseException]) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_mentions(inner, kind) for inner in error.exceptions)
    return isinstance(error, kind)
