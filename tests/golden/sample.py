"""One report with everything in it that a report can have: names with markup, every verdict, kinds, phases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pytest_vram.ci.comment import Comparison
from pytest_vram.memory import (
    Budget,
    Device,
    Environment,
    Exceeded,
    FixtureShare,
    Holder,
    HostRead,
    Layout,
    Measurement,
    Note,
    Peak,
    Phase,
    ProcessPeak,
    Report,
    Run,
    Segment,
    Series,
    TestRecord,
    Timeline,
    Unmeasured,
    Within,
)
from pytest_vram.units import GIB, MIB

DRY = Device(kind="dry", index=0, name="NVIDIA GeForce RTX 4080", total_bytes=16 * GIB, capability=(8, 9))
PLANS = Note(name="cuDNN | plans", text="their workspace is not known <b>", source="driver")
FP32 = Note(name="cuDNN convolutions", text="their plans are guesses", source="driver", size_bytes=200 * MIB)
LOST = Note(name="memory history", text="the program stopped it", source="recorder", figures=False)
CPU = Device(kind="host", index=0, name="CPU", total_bytes=24 * GIB)


def environment() -> Environment:
    return Environment(python="3.11.9", pytest_vram="0.1.0", torch="2.14.1", cuda="13.0", devices=(DRY, CPU))


def report() -> Report:
    """Six tests: over budget, within, unmeasured, leaking, failed for another reason, and without a budget."""
    return Report(environment=environment(), tests=(_over(), _within(), _unmeasured(), _leaky(), _failed(), _plain()))


def many(count: int = 14) -> Report:
    """Tests that differ in size only."""
    tests = tuple(
        TestRecord(
            nodeid=f"tests/test_sizes.py::test_size[{i}]",
            outcome="passed",
            measurements=(Measurement(device=DRY, peak=_peak((i + 1) * 100 * MIB)),),
        )
        for i in range(count)
    )
    return Report(environment=environment(), tests=tests)


def _peak(size: int) -> Peak:
    reserved = -(-size // (20 * MIB)) * 20 * MIB
    return Peak(requested_bytes=size - 300, allocated_bytes=size, reserved_bytes=reserved, device_bytes=reserved + MIB)


def timeline() -> Timeline:
    """Weights, then activations that rise and fall, then gradients."""
    weights = (0, 4, 4, 4, 4, 4)
    activations = (0, 0, 6, 9, 1, 0)
    gradients = (0, 0, 0, 1, 4, 4)
    total = tuple((w + a + g) * GIB for w, a, g in zip(weights, activations, gradients, strict=True))
    return Timeline(
        times=(0.0, 0.1, 0.25, 0.3, 0.45, 0.5),
        allocated=total,
        reserved=(0, 4 * GIB, 10 * GIB, 15 * GIB, 15 * GIB, 15 * GIB),
        categories=tuple(
            Series(name=name, sizes=tuple(size * GIB for size in sizes))
            for name, sizes in (("weights", weights), ("activations", activations), ("gradients", gradients))
        ),
        modules=(
            Series(name="model.layers.0", sizes=tuple(size // 2 for size in total)),
            Series(name="other", sizes=tuple(size - size // 2 for size in total)),
        ),
        peak_index=3,
        events=4321,
        layout=layout(),
    )


def layout() -> Layout:
    """Weights, activations with a hole, one segment without a tenant, and a hundred small ones."""
    weights = Run(state="active", size_bytes=4 * GIB, count=291, category="weights", location="conftest.py:12 in llama")
    saved = Run(state="active", size_bytes=5 * GIB, count=32, category="activations", location="model.py:41 in forward")
    late = Run(state="active", size_bytes=4 * GIB, count=32, category="activations", location="model.py:41 in forward")
    small = Run(state="active", size_bytes=MIB, count=8)
    waiting, hole = Run(state="pending", size_bytes=20 * MIB), Run(state="free", size_bytes=GIB - 420 * MIB)
    segments = (
        Segment(
            pool="large",
            size_bytes=10 * GIB - 400 * MIB,
            active_bytes=9 * GIB,
            pending_bytes=20 * MIB,
            largest_free_bytes=hole.size_bytes,
            blocks=66,
            runs=(saved, waiting, hole, late),
        ),
        Segment(pool="large", size_bytes=4 * GIB, active_bytes=4 * GIB, blocks=291, expandable=True, runs=(weights,)),
        Segment(
            pool="large", size_bytes=GIB, blocks=1, largest_free_bytes=GIB, runs=(Run(state="free", size_bytes=GIB),)
        ),
        Segment(pool="small", size_bytes=2 * MIB, count=100, active_bytes=MIB, blocks=900, runs=(small,)),
    )
    return Layout(
        reserved_bytes=15 * GIB - 200 * MIB,
        allocated_bytes=13 * GIB + 100 * MIB,
        pending_bytes=20 * MIB,
        cached_bytes=GIB,
        largest_free_bytes=GIB,
        segment_count=103,
        segments=segments,
    )


def _over() -> TestRecord:
    holders = (
        Holder(size_bytes=9 * GIB, count=64, location="model.py:41 in forward", category="activations", module="mlp"),
        Holder(size_bytes=4 * GIB, count=291, location="conftest.py:12 in llama", category="weights"),
    )
    measurement = Measurement(
        device=DRY,
        peak=_peak(14 * GIB),
        start_bytes=4 * GIB,
        fixtures=(FixtureShare(name="llama", scope="session", size_bytes=4 * GIB),),
        phases=(
            Phase(name="forward", start=0.1, end=0.3, peak=_peak(13 * GIB)),
            Phase(name="backward", start=0.3, end=0.5, peak=_peak(14 * GIB), limit_bytes=12 * GIB),
        ),
        holders=holders,
        host_reads=(
            HostRead(location="model.py:77", operation="item", count=3, answered=False, note="read as 0"),
            HostRead(location="masking.py:9", operation="all", count=1, answered=True),
        ),
        timeline=timeline(),
        notes=(PLANS, LOST),
        processes=(
            ProcessPeak(pid=4711, rank=0, peak=_peak(14 * GIB), start=1.5, end=9.25, ended="exit code 0"),
            ProcessPeak(pid=4712, rank=1, peak=Peak(), start=1.5, ended="left no figures"),
        ),
    )
    return TestRecord(
        nodeid="tests/test_train.py::test_step[a|b-<script>alert(1)</script>-`x`-*y*_z_]",
        outcome="failed",
        budget=Budget(limit_bytes=12 * GIB, where="tests/test_train.py:9"),
        measurements=(measurement,),
        verdict=Exceeded(over_bytes=2 * GIB, phase="backward"),
        worst_example="shape=(batch=3, seq=2048)",
    )


def _within() -> TestRecord:
    return TestRecord(
        nodeid="tests/test_文字化け.py::TestClass::test_幅の広い名前[параметр-🙂]",
        outcome="passed",
        budget=Budget(limit_bytes=8 * GIB),
        measurements=(Measurement(device=DRY, peak=_peak(6 * GIB + 123 * MIB), ooms=2, notes=(PLANS, FP32)),),
        verdict=Within(headroom_bytes=2 * GIB - 123 * MIB),
    )


def _unmeasured() -> TestRecord:
    return TestRecord(
        nodeid="tests/test_train.py::test_nothing_there",
        outcome="skipped",
        budget=Budget(limit_bytes=GIB),
        verdict=Unmeasured(reason="torch is not installed"),
    )


def _leaky() -> TestRecord:
    return TestRecord(
        nodeid="tests/test_train.py::test_leaks",
        outcome="failed",
        budget=Budget(limit_bytes=None, max_leak_bytes=0),
        measurements=(Measurement(device=DRY, peak=_peak(700 * MIB), leaked_bytes=3 * MIB, retries=1, ooms=1),),
    )


def _failed() -> TestRecord:
    return TestRecord(
        nodeid="tests/test_train.py::test_wrong_answer",
        outcome="failed",
        measurements=(Measurement(device=CPU, peak=Peak(requested_bytes=900, allocated_bytes=1024)),),
    )


def _plain() -> TestRecord:
    return TestRecord(
        nodeid="tests/a_folder_with_a_long_name/another_folder/test_file_name.py::test_a_name_that_takes_its_time[long-parameter-name]",
        outcome="passed",
        measurements=(
            Measurement(device=DRY, peak=_peak(512)),
            Measurement(device=CPU, peak=Peak(requested_bytes=0, allocated_bytes=0)),
        ),
    )


def change() -> Comparison:
    """A pull request on :func:`report`: one test grew, one shrank, one is new and one is gone."""
    after = report()
    over, within, *others = after.tests

    def earlier(test: TestRecord, size: int, **fields: Any) -> TestRecord:
        (measured,) = test.measurements
        return replace(test, measurements=(replace(measured, peak=_peak(size), **fields),))

    holders = (
        Holder(size_bytes=6 * GIB, count=64, location="model.py:41 in forward", category="activations", module="mlp"),
        Holder(size_bytes=4 * GIB, count=291, location="conftest.py:12 in llama", category="weights"),
        Holder(size_bytes=MIB, count=1, location="model.py:50 in gone (before)", category="other"),
    )
    before = (earlier(over, 11 * GIB, holders=holders), earlier(within, 7 * GIB), *others[:-1])
    gone = replace(others[-1], nodeid="tests/test_old.py::test_gone")
    return Comparison(
        after=after,
        before=replace(after, tests=(*before, gone)),
        base="release|2`x`",
        page="https://github.com/owner/name/actions/runs/1",
        name="torch 2.6",
    )


def first_change() -> Comparison:
    """A pull request whose base could not be measured, and whose tests keep to their budgets."""
    after = report()
    return Comparison(
        after=replace(after, tests=after.tests[1:2]), no_base="the base abc could not be measured: no file"
    )
