"""Compares tests with their budgets of host memory (``max_host_gb``), in the process that runs the tests."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pytest_vram.errors import VramBudgetExceeded
from pytest_vram.memory import HostPeak, TestRecord
from pytest_vram.plugin import records
from pytest_vram.plugin.enforcer import judged
from pytest_vram.plugin.ranks import CHILD_VARIABLE
from pytest_vram.probe.host_memory import HostMeter
from pytest_vram.report.host_memory import details
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_vram.plugin.runner import Runner

_METER = pytest.StashKey[HostMeter]()


class HostBudget:
    """Measures from before a test's first fixture to the end of its call, outside of the runner's own wrappers."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        """Begin to measure before the first fixture is set up."""
        budget = self._runner.budget(item)
        # A rank is a child process of the test that started it, so its memory counts for that test.
        if budget is None or budget.max_host_bytes is None or CHILD_VARIABLE in os.environ:
            return (yield)
        self._runner.probe()  # choosing it may import torch, which is not this test's memory
        meter = item.stash[_METER] = HostMeter(budget.max_host_bytes)
        try:
            return (yield)
        except BaseException:
            meter.stop()
            raise

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Measure the call, and compare a test that passed with its budget."""
        __tracebackhide__ = True
        meter = item.stash.get(_METER, None)
        if meter is None:
            return (yield)
        del item.stash[_METER]
        try:
            result = yield
        except pytest.skip.Exception:
            self._keep(item, meter.stop(), "skipped")
            raise
        except BaseException:
            self._keep(item, meter.stop(), "failed")
            raise
        peak = meter.stop()
        if getattr(item, "_excinfo", None):  # unittest does not raise a test's own error before the report is made
            self._keep(item, peak, "failed")
            return result
        self._hold(item, peak)
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """End the measurement of a test that was never called, as with ``--setup-only``."""
        if _METER in item.stash:
            item.stash[_METER].stop()
            del item.stash[_METER]
        return (yield)

    def _hold(self, item: pytest.Item, peak: HostPeak) -> None:
        """Compare a test that passed with its budget of host memory.

        Raises:
            VramBudgetExceeded: if it needed more host memory than its budget.
            VramUnmeasured: if host memory cannot be measured here and the session treats that as a failure.
        """
        __tracebackhide__ = True
        budget = self._runner.budget(item)
        assert budget is not None
        if peak.missing:
            skip = budget.only_host and self._runner.settings.on_unmeasured == "skip"
            self._keep(item, peak, "skipped" if skip else "passed")
            self._runner.say_unmeasured(item, peak.missing, skip=skip)
            return
        if not peak.over_bytes:
            self._keep(item, peak, "passed")
            return
        peak = replace(peak, holders=self._runner.host_holders(item))
        self._keep(item, peak, "failed")
        assert peak.peak_bytes is not None
        raise judged(
            VramBudgetExceeded(message(peak, budget.where), limit_bytes=peak.limit_bytes, peak_bytes=peak.peak_bytes)
        )

    def _keep(self, item: pytest.Item, peak: HostPeak, outcome: str) -> None:
        """Add the host memory to the test's record, or make one if there was no device to measure."""
        if records.RECORD in item.stash:
            worse = {} if outcome == "passed" else {"outcome": outcome}
            records.change(item, host=peak, **worse)
        else:
            budget = self._runner.budget(item)
            records.keep(item, TestRecord(nodeid=item.nodeid, outcome=outcome, budget=budget, host=peak))


def message(peak: HostPeak, where: str) -> str:
    """Return the message that a person reads when a test's host memory is above its budget."""
    lines = [
        f"the test needed {format_bytes(peak.peak_bytes)} of host memory, {format_bytes(peak.over_bytes)} more than"
        f" its budget of {format_bytes(peak.limit_bytes)}",
        f"  peak    {peak.peak_bytes or 0:>16,} bytes",
        f"  budget  {peak.limit_bytes:>16,} bytes  (max_host_gb{f' at {where}' if where else ''})",
        *(f"  {line}" for line in details(peak)),
        f"  {_remedy(peak)}",
    ]
    return "\n".join(lines)


def _remedy(peak: HostPeak) -> str:
    whole = peak.peak_bytes or 0
    if peak.children_bytes > whole / 2:
        return "try: fewer worker processes, or smaller ones: each loads its own copy of what it is given"
    if peak.files_bytes > whole / 2:
        return "try: most of it is mapped files, whose pages the system can take back: read fewer of them at a time"
    if peak.pinned_bytes and peak.pinned_bytes > whole / 2:
        return "try: most of it is pinned: pin fewer batches, or offload less"
    return "try: load one file of the checkpoint at a time, straight to the device, and drop each before the next"
