"""What fixtures hold, and what tests leave behind."""

from __future__ import annotations

import functools
import gc
import json
import sys
from typing import TYPE_CHECKING, Any

from pytest_vram.errors import VramLeak
from pytest_vram.plugin.failure import leak_message
from pytest_vram.plugin.figures import Share
from pytest_vram.plugin.judge import judged
from pytest_vram.plugin.ranks import PROPERTY
from pytest_vram.probe.nvml import descendants

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

    from pytest_vram.memory import Holder
    from pytest_vram.plugin.meter import Meter
    from pytest_vram.probe.protocol import Probe

_LINES = 5  # places that a leak's message names


class Ledger:
    """Keeps account of memory that outlives a test, in one process. Sizes are bytes, one entry a device.

    Every test of a session is followed, measured or not: what an unmarked one leaves behind is its own as well.
    """

    def __init__(self) -> None:
        self._live: dict[int, Share] = {}
        self._started: dict[int, frozenset[int]] = {}
        self._nested: list[tuple[int, ...]] = []
        self._residue: tuple[int, ...] = ()
        self._collected: tuple[int, ...] = ()
        self._start: tuple[int, ...] | None = None
        self._start_live: tuple[int, ...] = ()
        self._end: tuple[int, ...] = ()
        self._limit: int | None = None
        self._left_early: tuple[int, ...] | None = None
        self._lines_early: tuple[Holder, ...] = ()

    # -- fixtures

    def fixture_begins(self, probe: Probe) -> tuple[tuple[int, ...], set[int]]:
        """A fixture is about to be set up; returns what is held and which processes there are, for
        :meth:`fixture_is_up`."""
        self._nested.append(())
        return probe.allocated(), descendants()

    def fixture_is_up(
        self, fixturedef: pytest.FixtureDef[Any], probe: Probe, beginning: tuple[tuple[int, ...], set[int]]
    ) -> None:
        """A fixture is set up: what it added is its share, without that of fixtures that it set up itself.

        Processes that it started are the fixture's as well: see :meth:`share`.
        """
        before, processes = beginning
        if started := descendants() - processes:
            self._started[id(fixturedef)] = frozenset(started)
        inner = self._nested.pop()
        grown = _difference(probe.allocated(), before)
        if self._nested:
            self._nested[-1] = _sum((self._nested[-1], grown))
        sizes = _at_least_0(_difference(grown, inner))
        if any(sizes):
            name = fixturedef.argname.removeprefix("_unittest_").removeprefix("_xunit_")
            self._live[id(fixturedef)] = Share(name=name, scope=fixturedef.scope, sizes=sizes)
            if fixturedef.scope != "function":
                fixturedef.addfinalizer(functools.partial(self._fixture_goes, probe))

    def _fixture_goes(self, probe: Probe) -> None:
        """Before the first of the fixtures with a wider scope goes: see what the test left.

        Afterwards it could not be told from what goes with the fixture, gradients of its parameters for instance.
        """
        if self._start is not None and self._left_early is None:
            probe.settle()  # workspaces of libraries are nobody's leak
            self._left_early = early = self._left_for_good(probe)
            if self._limit is not None and max(early, default=0) > self._limit:
                self._lines_early = probe.left(early.index(max(early)), _LINES)

    def fixture_is_gone(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        """A fixture was torn down."""
        self._live.pop(id(fixturedef), None)
        self._started.pop(id(fixturedef), None)

    def owned(self) -> frozenset[int]:
        """Numbers of the processes that fixtures started which are still there."""
        return frozenset[int]().union(*self._started.values())

    def share(self, item: pytest.Item, meter: Meter) -> None:
        """Tell the meter which fixtures are the test's own, and what the others hold."""
        used = _fixtures_of(item)
        meter.fixtures = tuple(share for key, share in self._live.items() if key in used)
        meter.others = _sum(share.sizes for key, share in self._live.items() if key not in used)
        meter.started = frozenset[int]().union(*(pids for key, pids in self._started.items() if key in used))

    # -- tests

    def open(self, probe: Probe, *, measured: bool, max_leak_bytes: int | None = None) -> tuple[int, ...]:
        """A test begins. Returns what earlier tests left behind and is still there."""
        self._limit, self._left_early, self._lines_early = max_leak_bytes, None, ()
        now = probe.allocated()
        self._forget(now)
        if measured and any(self._residue) and self._residue != self._collected:
            # What is only waiting for the garbage collector, or hangs on the traceback of the last failure, would go
            # away in the midst of this test, and the room that it made would not be seen.
            for name in ("last_exc", "last_value", "last_type", "last_traceback"):
                vars(sys).pop(name, None)
            gc.collect()
            now = probe.allocated()
            self._forget(now)
            self._collected = self._residue
        self._start, self._start_live, self._end = now, self._held_by_fixtures(), now
        return tuple(min(r, n) for r, n in zip(self._residue, now, strict=False))

    def close(self, item: pytest.Item, probe: Probe, meter: Meter | None) -> None:
        """End of a test: what is left is its residue, and with ``max_leak_mb`` it is judged.

        Raises:
            VramLeak: it left more than it may.
        """
        if meter is not None:
            meter.intervals.end(meter.interval)
            if meter.call_interval is not None:
                meter.intervals.end(meter.call_interval)
            probe.settle()
        try:
            self._judge_left(item, probe, meter)
        finally:
            if meter is not None:
                probe.end_test()

    def _judge_left(self, item: pytest.Item, probe: Probe, meter: Meter | None) -> None:
        if self._start is None:
            return
        left, limit = self._left_for_good(probe), self._limit
        self._end = probe.allocated()
        self._residue = _at_least_0(_sum((self._residue, left)))
        if self._left_early is not None:  # pytest lets go of the fixtures' values after all of the teardown only
            left = self._left_early
        self._start = None
        leaked = max(left, default=0)
        if meter is not None and (limit is not None or leaked > 0):
            _add_leak(item, _at_least_0(left))
        if limit is not None and leaked > limit and not _failed(item):
            raise judged(
                VramLeak(
                    leak_message(leaked, limit, self._lines(probe, left.index(leaked)), probe.notes()),
                    limit_bytes=limit,
                    leaked_bytes=leaked,
                )
            )

    def _lines(self, probe: Probe, index: int) -> tuple[Holder, ...]:
        """Where what is left was allocated; what it was before a fixture went is known only then."""
        return self._lines_early if self._left_early is not None else probe.left(index, _LINES)

    def _left_for_good(self, probe: Probe) -> tuple[int, ...]:
        """What the test left, and if that is too much, what is left once all that can go is gone."""
        left = self._left(probe)
        if self._limit is not None and max(left, default=0) > self._limit:
            # Second stage: garbage in cycles is no leak, and neither is what the allocator only caches.
            gc.collect()
            probe.release()
            left = self._left(probe)
        return left

    def _left(self, probe: Probe) -> tuple[int, ...]:
        """Growth since the test began of what no living fixture brought; negative where something went away."""
        assert self._start is not None
        now = _difference(probe.allocated(), self._held_by_fixtures())
        return _difference(now, _difference(self._start, self._start_live))

    def _held_by_fixtures(self) -> tuple[int, ...]:
        return _sum(share.sizes for share in self._live.values())

    def _forget(self, now: tuple[int, ...]) -> None:
        """Residue that went away since the last look, as when a failed test's traceback was dropped."""
        freed = _at_least_0(_difference(self._end, now))
        self._residue = _at_least_0(_difference(self._residue, freed))
        self._end = now


def _fixtures_of(item: pytest.Item) -> set[int]:
    """Identities of the fixture definitions that the test uses, those asked for by ``getfixturevalue`` included."""
    request = getattr(item, "_request", None)
    return {id(definition) for definition in getattr(request, "_fixture_defs", {}).values()}


def _failed(item: pytest.Item) -> bool:
    return any(name == PROPERTY and '"outcome":"failed"' in str(text) for name, text in item.user_properties)


def _add_leak(item: pytest.Item, left: tuple[int, ...]) -> None:
    for index, (name, text) in enumerate(item.user_properties):
        if name == PROPERTY:
            data = json.loads(str(text))
            for measurement, size in zip(data.get("measurements", []), left, strict=False):
                measurement["leaked_bytes"] = size
            item.user_properties[index] = (name, json.dumps(data, separators=(",", ":")))


def _sum(many: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Add by device; a shorter tuple is one of a time when fewer devices were in use."""
    total: list[int] = []
    for sizes in many:
        total += [0] * (len(sizes) - len(total))
        for index, size in enumerate(sizes):
            total[index] += size
    return tuple(total)


def _difference(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return _sum((a, tuple(-size for size in b)))


def _at_least_0(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(0, size) for size in sizes)
