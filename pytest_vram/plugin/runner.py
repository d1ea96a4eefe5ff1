"""The hooks that run around each test, in the process that runs it."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram.errors import ProbeUnavailable, VramError, VramUsageError
from pytest_vram.memory import Budget
from pytest_vram.plugin import markers, rankrun, records
from pytest_vram.plugin.enforcer import Enforcer
from pytest_vram.plugin.examples import measuring_examples
from pytest_vram.plugin.fixtures import Gpu, Vram
from pytest_vram.plugin.ledger import Ledger
from pytest_vram.plugin.meter import Meter
from pytest_vram.plugin.ranks import CHILD_VARIABLE
from pytest_vram.probe.children import Children
from pytest_vram.probe.intervals import Intervals
from pytest_vram.probe.select import choose
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from pytest_vram.memory import Holder, Process
    from pytest_vram.plugin.settings import Settings
    from pytest_vram.probe.protocol import Probe

_METER = pytest.StashKey[Meter]()
_RANKS = pytest.StashKey["rankrun.Ranks | None"]()
_BUDGET = pytest.StashKey["Budget | None"]()
_MEASURED = pytest.StashKey[bool]()
"""The stash key under which a test keeps whether it is measured."""


class Gate:
    """Skips tests inside every other plugin's wrappers, so that these wrappers see the skip."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Call :meth:`Runner.gate`."""
        self._runner.gate(item)


class Runner:
    """Measures the tests of one process."""

    def __init__(self, config: pytest.Config, settings: Settings) -> None:
        self.config, self.settings = config, settings
        self._probe: Probe | None = None
        self._intervals: Intervals | None = None
        self._unavailable: str | None = None
        self._enforcer, self._ledger = Enforcer(settings), Ledger()
        self._going: pytest.Item | None = None  # the measured test that is being torn down
        self.children: Children | None = None

    # -- collection

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Check every marker before the first test runs.

        Raises:
            pytest.UsageError: if a marker cannot be used; the message lists all such markers.
        """
        problems = []
        for item in items:
            try:
                item.stash[_BUDGET] = budget = self._declared(item)
                item.stash[_MEASURED] = budget is not None or self.settings.measures_all or markers.concern(item)
                item.stash[_RANKS] = ranks = rankrun.wanted(item)
                if ranks is not None:
                    rankrun.empty(item)
            except VramUsageError as error:
                problems.append(f"{item.nodeid}: {error}")
        if problems:
            raise pytest.UsageError("\n".join(problems))

    def budget(self, item: pytest.Item) -> Budget | None:
        """Return the budget that a test declares."""
        return item.stash.get(_BUDGET, None)

    def say_unmeasured(self, item: pytest.Item, reason: str, *, skip: bool) -> None:
        """Call :meth:`pytest_vram.plugin.enforcer.Enforcer.say_unmeasured`."""
        __tracebackhide__ = True
        self._enforcer.say_unmeasured(item, reason, skip=skip)

    def host_holders(self, item: pytest.Item) -> tuple[Holder, ...]:
        """Return the lines whose CPU tensors held most at the peak; empty if the probe measures a device."""
        meter = item.stash.get(_METER, None)
        if meter is None or meter.probe.kind != "host":
            return ()
        return meter.counted_holders(meter.measurements()[0])

    def _declared(self, item: pytest.Item) -> Budget | None:
        mark = item.get_closest_marker(markers.MARK)
        path, line, _ = item.location
        where = f"{path}:{(line or 0) + 1}"
        limit = self.settings.max_bytes
        if mark is not None:
            return markers.parse(mark, default_max_bytes=limit, where=where)
        if limit is None:
            return None
        metric: Any = self.settings.metric  # the option admits only names of metrics
        return Budget(limit_bytes=limit, metric=metric, origin="ini", where="vram_max_gb")

    # -- one test

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        """Begin to measure before the first fixture is set up."""
        if _METER in item.stash:  # an earlier run of the same test
            del item.stash[_METER]
        records.forget(item)
        budget = item.stash.get(_BUDGET, None)
        concerns = item.stash.get(_MEASURED, False)
        probe = self.probe() if concerns else self._probe_at_hand()
        if probe is not None:
            if concerns:
                probe.settle()  # frees an earlier test's workspaces, which must not count as residue
            max_leak = None if budget is None else budget.max_leak_bytes
            residue = self._ledger.open(probe, measured=concerns, max_leak_bytes=max_leak)
            if concerns:
                assert self._intervals is not None
                item.stash[_METER] = Meter(
                    probe,
                    self._intervals,
                    budget,
                    residue,
                    self.settings.top,
                    timeline=self.settings.timeline,
                    children=self.children,
                )
        return (yield)

    def gate(self, item: pytest.Item) -> None:
        """Skip a test that cannot be measured or would be meaningless, before its first fixture is set up."""
        budget = item.stash.get(_BUDGET, None)
        if not item.stash.get(_MEASURED, False):
            return
        probe = self.probe()
        if probe is not None:
            self._skip_where_useless(item, probe, budget)
            ranks = item.stash.get(_RANKS, None)
            if ranks is not None and probe.kind == "cuda" and len(probe.devices()) < ranks.count:
                reason = f"needs a GPU for each of {ranks.count} ranks, and {len(probe.devices())} are visible"
                raise pytest.skip.Exception(reason, _use_item_location=True)
        elif budget is not None and not budget.only_host:
            self._enforcer.not_measured(item, budget, self._unavailable or "no probe", outcome="skipped")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Measure the call, and compare a test that passed with its budget after all other wrappers are done."""
        __tracebackhide__ = True
        meter = item.stash.get(_METER, None)
        if meter is None:
            return (yield)
        self._ledger.share(item, meter)
        meter.begin_call()
        try:
            try:
                with self._capped(item, meter), measuring_examples(item, meter):
                    result = yield
            finally:
                self._ledger.share(item, meter)  # the test may have requested more fixtures by name
        except BaseException as error:
            self._enforcer.record_failed(item, meter, error)
            raise
        if getattr(item, "_excinfo", None):  # unittest does not raise a test's own error before the report is made
            self._enforcer.record(item, meter, meter.measured(), "failed", None)
            return result
        self._enforcer.hold(item, meter)
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        """Run a test with ``vram_ranks`` in its ranks instead of this process."""
        __tracebackhide__ = True
        ranks = pyfuncitem.stash.get(_RANKS, None)
        if ranks is None:
            return None
        rankrun.run(pyfuncitem, ranks, self.children.folder if self.children is not None else None)
        return True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """Measure what is left after the last fixture is torn down, and fail a test that left too much."""
        self._going = item if _METER in item.stash else None
        try:
            return (yield)
        finally:
            self._going = None
            if self._probe is not None:
                meter = item.stash.get(_METER, None)
                left = self._left_processes(item, meter)
                leak = self._ledger.close(item, self._probe, meter)
                self._enforcer.refuse_leak(leak)
                self._enforcer.refuse_left_processes(meter, left)

    def _left_processes(self, item: pytest.Item, meter: Meter | None) -> tuple[Process, ...]:
        """Return the test's processes that still run and hold memory, without those of fixtures that are still set up.

        They are also added to the test's record.
        """
        if self.children is None or meter is None:
            return ()
        owned = self._ledger.owned()
        left = self.children.left(lambda process: meter.is_mine(process) and process.pid not in owned)
        if left:
            records.add_left(item, left)
        return left

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
        """Show a broken budget as its message alone, and send the test's record with the report of its teardown.

        The traceback of a broken budget is left out, because it would only show this plugin's code.
        """
        report = yield
        if report.failed:
            records.change(item, outcome="failed")
        if call.when == "teardown":
            records.attach(item, report)
        error = call.excinfo.value if call.excinfo is not None else None
        if isinstance(error, VramError) and error.judged and report.failed:
            shown = call.excinfo.getrepr(style="value")  # type: ignore[union-attr]  # error is its value
            if shown.reprcrash is not None:  # the line in the summary and the message in JUnit's file
                shown.reprcrash.message = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            report.longrepr = shown
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        """Measure what each fixture holds."""
        probe = self._probe_at_hand()
        if probe is None:
            return (yield)
        before = self._ledger.fixture_begins(probe)
        try:
            return (yield)
        finally:
            self._ledger.fixture_is_up(fixturedef, probe, before)

    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        """Remove a fixture that was torn down from the account, and drop its value from the test.

        pytest would keep the value until after the teardown, so its memory would look like a leak.
        """
        self._ledger.fixture_is_gone(fixturedef)
        if self._going is not None:
            (getattr(self._going, "funcargs", None) or {}).pop(fixturedef.argname, None)

    # -- the device

    def probe(self) -> Probe | None:
        """Return the session's probe, which is chosen at the first call.

        If there is none, return None and keep the reason for messages.
        """
        if self._probe is None and self._unavailable is None:
            try:
                probe = self.config.hook.pytest_vram_probe(config=self.config) or choose(self.settings.gpu)
                if not probe.devices():
                    raise ProbeUnavailable("no device is visible: look at CUDA_VISIBLE_DEVICES")
            except ProbeUnavailable as error:
                self._unavailable = str(error)
            else:
                self._probe, self._intervals = probe, Intervals(probe)
                if probe.kind in ("cuda", "dry", "host"):
                    self.children = Children(probe.kind)
        return self._probe

    def pytest_unconfigure(self) -> None:
        """Close the folder in which processes leave their figures, because the session is over."""
        if self.children is not None:
            self.children.close()
            self.children = None

    def _probe_at_hand(self) -> Probe | None:
        """Return the probe, or None if choosing it would import torch into a session that has not needed it yet."""
        if (
            self._probe is None
            and "torch" not in sys.modules
            and not self.config.hook.pytest_vram_probe.get_hookimpls()
        ):
            return None
        return self.probe()

    def gpu(self, request: pytest.FixtureRequest) -> Gpu:
        """Return the value of the ``gpu`` fixture; skip or fail the test if there is no device."""
        probe = self.probe()
        if probe is None:
            self._enforcer.refuse(f"no GPU to test on: {self._unavailable}")
        assert probe is not None
        devices = probe.devices()
        return Gpu.of(devices[int(os.environ.get(CHILD_VARIABLE, "0")) % len(devices)])

    def vram(self, request: pytest.FixtureRequest) -> Vram:
        """Return the value of the ``vram`` fixture; skip or fail the test if there is nothing to measure with."""
        meter = request.node.stash.get(_METER, None)
        if meter is None:
            self._enforcer.refuse(f"nothing to measure with: {self._unavailable}")
        return Vram(meter)

    def _skip_where_useless(self, item: pytest.Item, probe: Probe, budget: Budget | None) -> None:
        if probe.kind == "dry" and item.get_closest_marker(markers.VALUES_MARK):
            name = probe.devices()[0].name
            reason = f"needs values computed on the device (vram_values), and {name} is a dry GPU"
            raise pytest.skip.Exception(reason, _use_item_location=True)
        if budget is not None and budget.min_free_bytes is not None:
            free = probe.free_bytes(budget.device or 0)
            if free is not None and free < budget.min_free_bytes:
                wanted = format_bytes(budget.min_free_bytes)
                reason = f"needs {wanted} of free GPU memory (min_free_gb), and there are {format_bytes(free)}"
                raise pytest.skip.Exception(reason, _use_item_location=True)

    @contextlib.contextmanager
    def _capped(self, item: pytest.Item, meter: Meter) -> Iterator[None]:
        budget = meter.budget
        if budget is None or not budget.enforce or budget.limit_bytes is None:
            yield
            return
        indices = [d.index for d in meter.probe.devices() if budget.device in (None, d.index)]
        for index in indices:  # a budget that cannot be capped is still compared with the peak afterwards
            meter.probe.cap(index, budget.limit_bytes + meter.not_ours(index))
        try:
            yield
        finally:
            for index in indices:
                meter.probe.cap(index, None)
