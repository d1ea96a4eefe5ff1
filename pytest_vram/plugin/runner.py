"""The hooks that run around each test, in the process that runs it."""

from __future__ import annotations

import contextlib
import gc
import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram.errors import (
    ProbeUnavailable,
    VramBudgetExceeded,
    VramError,
    VramLeak,
    VramRegression,
    VramUnmeasured,
    VramUsageError,
)
from pytest_vram.memory import Budget, Exceeded, FixtureShare, TestRecord, Unmeasured
from pytest_vram.plugin import marks
from pytest_vram.plugin.examples import measuring_examples
from pytest_vram.plugin.failure import memory_section
from pytest_vram.plugin.fixtures import Gpu, Vram
from pytest_vram.plugin.meter import Meter
from pytest_vram.probe.intervals import Intervals
from pytest_vram.probe.select import choose
from pytest_vram.report.codec import encode
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from pytest_vram.memory import Measurement, Verdict
    from pytest_vram.plugin.settings import Settings
    from pytest_vram.probe.protocol import Probe

PROPERTY = "vram"
_METER = pytest.StashKey[Meter]()
_BUDGET = pytest.StashKey["Budget | None"]()


class VramUnmeasuredWarning(pytest.PytestWarning):
    """A budgeted test ran, and its memory could not be measured."""


class Runner:
    """Measures the tests of one process."""

    def __init__(self, config: pytest.Config, settings: Settings) -> None:
        self.config, self.settings = config, settings
        self._probe: Probe | None = None
        self._intervals: Intervals | None = None
        self._unavailable: str | None = None
        self._live: dict[int, FixtureShare] = {}
        self._nested: list[int] = []
        self._residue: tuple[int, ...] = ()
        self._end: tuple[int, ...] = ()
        self._baseline: Any = None
        self.left_behind: dict[str, int] = {}

    # -- collection

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Check every marker before the first test runs."""
        problems = []
        for item in items:
            try:
                item.stash[_BUDGET] = self._declared(item)
            except VramUsageError as error:
                problems.append(f"{item.nodeid}: {error}")
        if problems:
            raise pytest.UsageError("\n".join(problems))

    def _declared(self, item: pytest.Item) -> Budget | None:
        mark = item.get_closest_marker(marks.MARK)
        path, line, _ = item.location
        where = f"{path}:{(line or 0) + 1}"
        limit = self.settings.max_bytes
        if mark is not None:
            return marks.parse(mark, default_max_bytes=limit, where=where)
        if limit is None:
            return None
        return Budget(limit_bytes=limit, metric=self.settings.metric, origin="ini", where="vram_max_gb")  # type: ignore[arg-type]

    # -- one test

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        """Begin to measure before the first fixture is set up."""
        if _METER in item.stash:  # an earlier run of the same test
            del item.stash[_METER]
        item.user_properties[:] = [p for p in item.user_properties if p[0] != PROPERTY]
        budget = item.stash.get(_BUDGET, None)
        if not self._concerns(item, budget):
            return (yield)
        probe = self.probe()
        if probe is None:
            if budget is not None:
                self._not_measured(item, budget, self._unavailable or "no probe", outcome="skipped")
            return (yield)
        self._skip_where_useless(item, probe, budget)
        now = probe.allocated()
        self._note_freed(now)
        assert self._intervals is not None
        residue = tuple(min(r, n) for r, n in zip(self._residue, now, strict=False))
        meter = Meter(probe, self._intervals, budget, residue, self.settings.top)
        meter.earlier_fixtures = tuple(self._live.values())
        item.stash[_METER] = meter
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Measure the call, and raise here what the budget has to say: outermost, after everything else passed."""
        __tracebackhide__ = True
        meter = item.stash.get(_METER, None)
        if meter is None:
            return (yield)
        used = _fixtures_of(item)
        meter.begin_call(
            tuple(share for key, share in self._live.items() if key in used),
            tuple(share for key, share in self._live.items() if key not in used),
        )
        try:
            with self._capped(item, meter), measuring_examples(item, meter):
                result = yield
        except BaseException as error:
            self._record_failed(item, meter, error)
            raise
        if getattr(item, "_excinfo", None):  # unittest keeps a test's own error to itself until the report is made
            self._record(item, meter, meter.measurements(), "failed", None)
            return result
        self._judge(item, meter)
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """After the last fixture is gone, see what is left."""
        try:
            return (yield)
        finally:
            meter = item.stash.get(_METER, None)
            if meter is not None:
                self._close(item, meter)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
        """Show a broken budget as its message: the traceback would be this plugin's."""
        report = yield
        error = call.excinfo.value if call.excinfo is not None else None
        if isinstance(error, VramError) and getattr(error, "judged", False) and report.failed:
            report.longrepr = call.excinfo.getrepr(style="value")  # type: ignore[union-attr]
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        """Learn what each fixture holds."""
        probe = self._probe
        if probe is None:
            return (yield)
        before = max(probe.allocated(), default=0)
        self._nested.append(0)
        try:
            return (yield)
        finally:
            inner = self._nested.pop()
            grown = max(probe.allocated(), default=0) - before
            if self._nested:
                self._nested[-1] += grown
            if grown - inner > 0:
                name = fixturedef.argname.removeprefix("_unittest_").removeprefix("_xunit_")
                share = FixtureShare(name=name, scope=fixturedef.scope, size_bytes=grown - inner)
                self._live[id(fixturedef)] = share

    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        """The fixture is gone."""
        self._live.pop(id(fixturedef), None)

    # -- the device

    def probe(self) -> Probe | None:
        """The session's probe, chosen when first asked for; ``None``, with the reason kept, where there is none."""
        if self._probe is None and self._unavailable is None:
            try:
                probe = self.config.hook.pytest_vram_probe(config=self.config) or choose(self.settings.gpu)
                if not probe.devices():
                    raise ProbeUnavailable("no device is visible: look at CUDA_VISIBLE_DEVICES")
            except ProbeUnavailable as error:
                self._unavailable = str(error)
            else:
                self._probe, self._intervals = probe, Intervals(probe)
        return self._probe

    def gpu(self, request: pytest.FixtureRequest) -> Gpu:
        """The ``gpu`` fixture."""
        probe = self.probe()
        if probe is None:
            self._refuse(f"no GPU to test on: {self._unavailable}")
        assert probe is not None
        return Gpu.of(probe.devices()[0])

    def vram(self, request: pytest.FixtureRequest) -> Vram:
        """The ``vram`` fixture."""
        meter = request.node.stash.get(_METER, None)
        if meter is None:
            self._refuse(f"nothing to measure with: {self._unavailable}")
        return Vram(meter)

    # -- judging

    def _judge(self, item: pytest.Item, meter: Meter) -> None:
        __tracebackhide__ = True
        measurements = meter.measurements(meter.worst[0] if meter.worst else None)
        verdict = meter.verdict(measurements)
        record = self._record(item, meter, measurements, "passed", verdict)
        if isinstance(verdict, Exceeded):
            raise _judged(meter.exceeded(measurements, verdict, example=meter.worst[1] if meter.worst else None))
        if isinstance(verdict, Unmeasured):
            self._say_unmeasured(item, verdict.reason, skip=False)
        self._compare(record)

    def _compare(self, record: TestRecord) -> None:
        __tracebackhide__ = True
        if self.settings.baseline is None or self.settings.update_baseline:
            return
        from pytest_vram import baseline

        if self._baseline is None:
            self._baseline = baseline.read(self.settings.baseline)
        for change in baseline.compare_record(record, self._baseline, self.settings.tolerance_percent):
            if change.regressed:
                raise _judged(
                    VramRegression(
                        change.message(self.settings.baseline),
                        baseline_bytes=change.before_bytes,
                        peak_bytes=change.after_bytes,
                        tolerance_percent=self.settings.tolerance_percent,
                    )
                )

    def _record_failed(self, item: pytest.Item, meter: Meter, error: BaseException) -> None:
        if isinstance(error, pytest.skip.Exception):
            self._record(item, meter, meter.measurements(), "skipped", None)
            return
        measurements = meter.measurements(meter.worst[0] if meter.worst else None)
        verdict = meter.verdict(measurements) if _mentions(error, VramBudgetExceeded) else None
        self._record(item, meter, measurements, "failed", verdict)
        if not _mentions(error, VramBudgetExceeded):
            measurement = max(measurements, key=lambda m: m.peak.allocated_bytes or 0)
            if measurement.peak.allocated_bytes or measurement.peak.device_bytes:
                holders = meter.probe.holders(measurement.device.index, meter.top)
                item.add_report_section("call", "GPU memory", memory_section(measurement, holders))

    def _record(
        self,
        item: pytest.Item,
        meter: Meter,
        measurements: tuple[Measurement, ...],
        outcome: str,
        verdict: Verdict | None,
    ) -> TestRecord:
        record = TestRecord(
            nodeid=item.nodeid,
            outcome="failed" if isinstance(verdict, Exceeded) else outcome,
            budget=meter.budget,
            measurements=measurements,
            verdict=verdict,
            worst_example=meter.worst[1] if meter.worst else None,
        )
        self._publish(item, record)
        return record

    def _publish(self, item: pytest.Item, record: TestRecord) -> None:
        item.user_properties[:] = [p for p in item.user_properties if p[0] != PROPERTY]
        item.user_properties.append((PROPERTY, json.dumps(encode(record), separators=(",", ":"))))
        item.ihook.pytest_vram_record(item=item, record=record)

    def _close(self, item: pytest.Item, meter: Meter) -> None:
        """End of a test: what is left is its residue, and with ``max_leak_mb`` it is judged."""
        probe = meter.probe
        meter.intervals.end(meter.interval)
        if meter.call_interval is not None:
            meter.intervals.end(meter.call_interval)
        probe.end_test()
        probe.settle()
        limit = meter.budget.max_leak_bytes if meter.budget else None
        left = self._left(meter)
        if limit is not None and left > limit:
            # Second stage: garbage in cycles is no leak, and neither is what the allocator only caches.
            gc.collect()
            probe.release()
            left = self._left(meter)
        self._end = probe.allocated()
        grown = [end - start for end, start in zip(self._end, (*meter.start, *[0] * len(self._end)), strict=False)]
        if left > 0:
            self.left_behind[item.nodeid] = left
            padded = (*self._residue, *[0] * len(grown))
            self._residue = tuple(r + max(0, min(g, left)) for r, g in zip(padded, grown, strict=False))
        if limit is not None:
            self._add_leak(item, left)
            failed = any(p[0] == PROPERTY and '"outcome":"failed"' in str(p[1]) for p in item.user_properties)
            if left > limit and not failed:
                raise _judged(
                    VramLeak(
                        f"the test left {format_bytes(left)} ({left:,} bytes) behind, allowed are"
                        f" {format_bytes(limit)} (max_leak_mb). Something outlives it: a global, a cache, a closure,"
                        " or an optimizer's state",
                        limit_bytes=limit,
                        leaked_bytes=left,
                    )
                )

    def _left(self, meter: Meter) -> int:
        """Bytes that are held now and were not before the test, fixtures that live on left out."""
        now, start = max(meter.probe.allocated(), default=0), max(meter.start, default=0)
        outliving = sum(share.size_bytes for share in self._live.values() if share not in meter.earlier_fixtures)
        return max(0, now - start - outliving)

    def _add_leak(self, item: pytest.Item, left: int) -> None:
        for index, (name, text) in enumerate(item.user_properties):
            if name == PROPERTY:
                data = json.loads(str(text))
                for measurement in data.get("measurements", [])[:1]:
                    measurement["leaked_bytes"] = left
                item.user_properties[index] = (name, json.dumps(data, separators=(",", ":")))

    def _note_freed(self, now: tuple[int, ...]) -> None:
        """Residue that went away since the last test, as when a failed test's traceback was dropped."""
        freed = [max(0, end - n) for end, n in zip(self._end, now, strict=False)]
        self._residue = tuple(max(0, r - f) for r, f in zip(self._residue, freed, strict=False))

    # -- where nothing can be measured

    def _concerns(self, item: pytest.Item, budget: Budget | None) -> bool:
        names = getattr(item, "fixturenames", ())
        return budget is not None or self.settings.measures_all or "vram" in names or "gpu" in names

    def _skip_where_useless(self, item: pytest.Item, probe: Probe, budget: Budget | None) -> None:
        if probe.kind == "dry" and item.get_closest_marker(marks.VALUES_MARK):
            pytest.skip(
                f"needs values computed on the device (vram_values), and {probe.devices()[0].name} is a dry GPU"
            )
        if budget is not None and budget.min_free_bytes is not None:
            free = probe.free_bytes(budget.device or 0)
            if free is not None and free < budget.min_free_bytes:
                wanted = format_bytes(budget.min_free_bytes)
                pytest.skip(f"needs {wanted} of free GPU memory (min_free_gb), and there are {format_bytes(free)}")

    def _not_measured(self, item: pytest.Item, budget: Budget, reason: str, *, outcome: str) -> None:
        record = TestRecord(nodeid=item.nodeid, outcome=outcome, budget=budget, verdict=Unmeasured(reason=reason))
        self._publish(item, record)
        self._say_unmeasured(item, reason, skip=True)

    def _say_unmeasured(self, item: pytest.Item, reason: str, *, skip: bool) -> None:
        __tracebackhide__ = True
        policy = self.settings.on_unmeasured
        if policy == "fail":
            raise _judged(VramUnmeasured(f"the budget could not be measured: {reason}"))
        if policy == "warn":
            warnings.warn(VramUnmeasuredWarning(f"{item.nodeid}: the budget was not measured: {reason}"), stacklevel=2)
        elif skip:
            pytest.skip(f"vram budget not measured: {reason}")

    def _refuse(self, text: str) -> None:
        if self.settings.on_unmeasured == "fail":
            raise VramUnmeasured(text)
        pytest.skip(text)

    @contextlib.contextmanager
    def _capped(self, item: pytest.Item, meter: Meter) -> Iterator[None]:
        budget = meter.budget
        if budget is None or not budget.enforce or budget.limit_bytes is None:
            yield
            return
        indices = [d.index for d in meter.probe.devices() if budget.device in (None, d.index)]
        for index in indices:  # where nothing can be capped, the budget is still held against the peak afterwards
            meter.probe.cap(index, budget.limit_bytes + meter.not_ours(index))
        try:
            yield
        finally:
            for index in indices:
                meter.probe.cap(index, None)


def _fixtures_of(item: pytest.Item) -> set[int]:
    """Identities of the fixture definitions that the test uses, those asked for by ``getfixturevalue`` included."""
    request = getattr(item, "_request", None)
    return {id(definition) for definition in getattr(request, "_fixture_defs", {}).values()}


def _judged(error: VramError) -> VramError:
    error.judged = True  # type: ignore[attr-defined]
    return error


def _mentions(error: BaseException, kind: type[BaseException]) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_mentions(inner, kind) for inner in error.exceptions)
    return isinstance(error, kind)
