"""Carries out what budgets and baselines say: raises their errors, skips, and keeps each test's record."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram.errors import VramBudgetExceeded, VramError, VramLeak, VramRegression, VramUnmeasured
from pytest_vram.memory import Exceeded, TestRecord, Unmeasured
from pytest_vram.plugin import records
from pytest_vram.plugin.failure import leak_message, memory_section
from pytest_vram.plugin.ranks import CHILD_VARIABLE, left_text
from pytest_vram.plugin.verdicts import UNTOUCHED, judge
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_vram.memory import Budget, Measurement, Process, Verdict
    from pytest_vram.plugin.ledger import Leak
    from pytest_vram.plugin.meter import Meter
    from pytest_vram.plugin.settings import Settings
    from pytest_vram.plugin.verdicts import Measured


class VramUnmeasuredWarning(pytest.PytestWarning):
    """Warns that a budgeted test ran and its memory could not be measured."""


class Enforcer:
    """Raises the errors of broken budgets and baselines, and keeps each test's record."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._baseline: Any = None

    def hold(self, item: pytest.Item, meter: Meter) -> None:
        """Compare a test that passed with its budget and its baseline.

        Raises:
            VramBudgetExceeded: if it needed more than its budget.
            VramRegression: if it needs more than the baseline and the tolerance allow.
            VramUnmeasured: if its memory could not be measured and the session treats that as a failure.
        """
        __tracebackhide__ = True
        measured = _measured(meter)
        verdict = judge(meter.budget, measured)
        if meter.unknown_phase is not None and not isinstance(verdict, Exceeded):
            verdict = Unmeasured(reason=meter.unknown_phase)
        skipped = self._skips(verdict) and CHILD_VARIABLE not in os.environ
        record = self.record(item, meter, measured, "skipped" if skipped else "passed", verdict)
        if CHILD_VARIABLE in os.environ:
            return  # this is one rank of many: the process that started the ranks checks the budget
        if isinstance(verdict, Exceeded):
            example = meter.worst[1] if meter.worst else None
            raise judged(meter.exceeded(measured, verdict, example=example))
        if isinstance(verdict, Unmeasured):
            self.say_unmeasured(item, verdict.reason, skip=skipped)
        self._compare(record)

    def refuse_leak(self, leak: Leak | None) -> None:
        """Fail a test that left more than ``max_leak_mb`` behind.

        Raises:
            VramLeak: if there is a leak; the message names the lines that allocated what is left.
        """
        __tracebackhide__ = True
        if leak is not None:
            message = leak_message(leak.size_bytes, leak.limit_bytes, leak.holders, leak.notes)
            raise judged(VramLeak(message, limit_bytes=leak.limit_bytes, leaked_bytes=leak.size_bytes))

    def refuse_left_processes(self, meter: Meter | None, left: Sequence[Process]) -> None:
        """Fail a test that left processes running which hold more than ``max_leak_mb``.

        Raises:
            VramLeak: if they hold more than the test may leave.
        """
        __tracebackhide__ = True
        limit = meter.budget.max_leak_bytes if meter is not None and meter.budget is not None else None
        held = sum(process.left_bytes or 0 for process in left)
        if limit is not None and held > limit:
            names = "".join(f"\n    {left_text(process)}" for process in left)
            raise judged(
                VramLeak(
                    f"the test left processes running that hold {format_bytes(held)} ({held:,} bytes), and its limit is"
                    f" {format_bytes(limit)} (max_leak_mb){names}\n  try: end what the test starts, and wait for it",
                    limit_bytes=limit,
                    leaked_bytes=held,
                )
            )

    def _skips(self, verdict: Verdict | None) -> bool:
        """Return whether a test that ran is reported as skipped because it could not be measured.

        A test that never touched the device has kept to its budget, so it is reported, but not skipped.
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
        """Record a test that failed or was skipped by itself, and add to its error what the test held."""
        if isinstance(error, pytest.skip.Exception):
            self.record(item, meter, meter.measured(), "skipped", None)
            return
        if _mentions(error, VramBudgetExceeded):
            measured = _measured(meter)
            self.record(item, meter, measured, "failed", judge(meter.budget, measured))
            return
        try:
            measured = _measured(meter)
            self.record(item, meter, measured, "failed", None)
            _explain(item, meter, measured.measurements, error)
        except Exception as trouble:  # no error of ours may hide the test's own error from the user
            item.add_report_section("call", "GPU memory", f"could not be read: {trouble!r}")

    def record(
        self,
        item: pytest.Item,
        meter: Meter,
        measured: Measured,
        outcome: str,
        verdict: Verdict | None,
    ) -> TestRecord:
        """Make the test's record, keep it with the test, and return it."""
        measurements = measured.measurements
        if meter.timeline or isinstance(verdict, Exceeded):
            measurements = meter.detailed(measurements)
        record = TestRecord(
            nodeid=item.nodeid,
            outcome="failed" if isinstance(verdict, Exceeded) else outcome,
            budget=meter.budget,
            measurements=measurements,
            verdict=verdict,
            worst_example=meter.worst[1] if meter.worst else None,
            processes=measured.processes,
        )
        records.keep(item, record)
        return record

    def not_measured(self, item: pytest.Item, budget: Budget, reason: str, *, outcome: str) -> None:
        """Record that a budgeted test cannot be measured, and skip it, fail it or warn, as the session's setting says.

        Raises:
            VramUnmeasured: if the setting is ``fail``.
        """
        record = TestRecord(nodeid=item.nodeid, outcome=outcome, budget=budget, verdict=Unmeasured(reason=reason))
        records.keep(item, record)
        self.say_unmeasured(item, reason, skip=True)

    def say_unmeasured(self, item: pytest.Item, reason: str, *, skip: bool) -> None:
        """Fail, warn or skip, as the session's setting ``on_unmeasured`` says.

        Args:
            item: the test.
            reason: why it could not be measured.
            skip: skip the test if the setting is ``skip``; otherwise only the summary reports the test.

        Raises:
            VramUnmeasured: if the setting is ``fail``.
        """
        __tracebackhide__ = True
        policy = self.settings.on_unmeasured
        if policy == "fail":
            raise judged(VramUnmeasured(f"the budget could not be measured: {reason}"))
        if policy == "warn":
            warnings.warn(VramUnmeasuredWarning(f"{item.nodeid}: the budget was not measured: {reason}"), stacklevel=2)
        elif skip:
            raise pytest.skip.Exception(f"vram budget not measured: {reason}", _use_item_location=True)

    def refuse(self, text: str) -> None:
        """Skip a test whose fixture has no device to use, or fail it if the session's setting says so.

        Raises:
            VramUnmeasured: if the setting ``on_unmeasured`` is ``fail``.
        """
        if self.settings.on_unmeasured == "fail":
            raise VramUnmeasured(text)
        raise pytest.skip.Exception(text, _use_item_location=True)


def _measured(meter: Meter) -> Measured:
    """Return what was measured of the test's worst hypothesis example, or of the whole test if it has no examples."""
    return meter.measured(meter.worst[0] if meter.worst else None)


def _explain(item: pytest.Item, meter: Meter, measurements: tuple[Measurement, ...], error: BaseException) -> None:
    """Add a section on what the test held and, if it ran out of memory under its own budget's cap, a note on that."""
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
    """Mark an error as this plugin's verdict, so that it is shown without its traceback, and return it."""
    error.judged = True
    return error


def _mentions(error: BaseException, kind: type[BaseException]) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_mentions(inner, kind) for inner in error.exceptions)
    return isinstance(error, kind)
