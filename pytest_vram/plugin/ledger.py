"""Keeps account of the memory that fixtures hold and that tests leave behind."""

from __future__ import annotations

import functools
import gc
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_vram.plugin import records
from pytest_vram.plugin.figures import Share
from pytest_vram.probe.nvml import descendants

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

    from pytest_vram.memory import Holder, Note
    from pytest_vram.plugin.meter import Meter
    from pytest_vram.probe.protocol import Probe

_LINES = 5  # the most allocating lines that a leak's message names


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """Memory that a test left behind, beyond what it may leave.

    Attributes:
        size_bytes: the bytes that are left on the device with the most.
        limit_bytes: the bytes that the test may leave.
        holders: the lines that allocated what is left.
        notes: assumptions that the figure rests on.
    """

    size_bytes: int
    limit_bytes: int
    holders: tuple[Holder, ...]
    notes: tuple[Note, ...]


class Ledger:
    """Keeps account of memory that outlives a test, in one process. Sizes are in bytes, with one entry per device.

    The ledger follows every test of a session, measured or not, so that no test is charged for what an earlier,
    unmarked test left behind.
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
        """Begin the account of a fixture that is about to be set up.

        Returns:
            The allocated bytes and the processes at this moment, for :meth:`fixture_is_up`.
        """
        self._nested.append(())
        return probe.allocated(), descendants()

    def fixture_is_up(
        self, fixturedef: pytest.FixtureDef[Any], probe: Probe, beginning: tuple[tuple[int, ...], set[int]]
    ) -> None:
        """Record the share of a fixture that is set up: what it added, without what other fixtures within it added.

        The processes that it started belong to the fixture as well: see :meth:`share`.
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
        """Measure what the test left, just before the first fixture with a wider scope is torn down.

        After that, what the test left could not be told from what is freed together with the fixture, such as the
        gradients of the fixture's parameters.
        """
        if self._start is not None and self._left_early is None:
            probe.settle()  # the workspaces of libraries are not a leak
            self._left_early = early = self._left_for_good(probe)
            if self._limit is not None and max(early, default=0) > self._limit:
                self._lines_early = probe.left(early.index(max(early)), _LINES)

    def fixture_is_gone(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        """Remove the share and the processes of a fixture that was torn down."""
        self._live.pop(id(fixturedef), None)
        self._started.pop(id(fixturedef), None)

    def owned(self) -> frozenset[int]:
        """Return the process ids (PIDs) that belong to fixtures which are still set up."""
        return frozenset[int]().union(*self._started.values())

    def share(self, item: pytest.Item, meter: Meter) -> None:
        """Tell the meter the shares of the fixtures that the test uses, and what other fixtures hold."""
        used = _fixtures_of(item)
        meter.fixtures = tuple(share for key, share in self._live.items() if key in used)
        meter.others = _sum(share.sizes for key, share in self._live.items() if key not in used)
        meter.started = frozenset[int]().union(*(pids for key, pids in self._started.items() if key in used))

    # -- tests

    def open(self, probe: Probe, *, measured: bool, max_leak_bytes: int | None = None) -> tuple[int, ...]:
        """Begin a test, and return the bytes that earlier tests left behind and that are still held."""
        self._limit, self._left_early, self._lines_early = max_leak_bytes, None, ()
        now = probe.allocated()
        self._forget(now)
        if measured and any(self._residue) and self._residue != self._collected:
            # Memory that only waits for the garbage collector, or that the last failure's traceback keeps alive, would
            # be freed in the middle of this test. The test could then fill the freed memory without being charged.
            for name in ("last_exc", "last_value", "last_type", "last_traceback"):
                vars(sys).pop(name, None)
            gc.collect()
            now = probe.allocated()
            self._forget(now)
            self._collected = self._residue
        self._start, self._start_live, self._end = now, self._held_by_fixtures(), now
        return tuple(min(r, n) for r, n in zip(self._residue, now, strict=False))

    def close(self, item: pytest.Item, probe: Probe, meter: Meter | None) -> Leak | None:
        """End a test, and add what it left behind to the residue.

        Returns:
            The leak, if the test left more than its ``max_leak_mb`` allows and has not failed already; otherwise None.
        """
        if meter is not None:
            meter.intervals.end(meter.interval)
            if meter.call_interval is not None:
                meter.intervals.end(meter.call_interval)
            probe.settle()
        try:
            return self._close(item, probe, meter)
        finally:
            if meter is not None:
                probe.end_test()

    def _close(self, item: pytest.Item, probe: Probe, meter: Meter | None) -> Leak | None:
        if self._start is None:
            return None
        left, limit = self._left_for_good(probe), self._limit
        self._end = probe.allocated()
        self._residue = _at_least_0(_sum((self._residue, left)))
        if self._left_early is not None:  # pytest drops the fixtures' values only after the whole teardown
            left = self._left_early
        self._start = None
        leaked = max(left, default=0)
        if meter is not None and (limit is not None or leaked > 0):
            records.add_leak(item, _at_least_0(left))
        if limit is None or leaked <= limit or records.failed(item):
            return None
        holders = self._lines(probe, left.index(leaked))
        return Leak(size_bytes=leaked, limit_bytes=limit, holders=holders, notes=probe.notes())

    def _lines(self, probe: Probe, index: int) -> tuple[Holder, ...]:
        """Return the lines that allocated what is left.

        If what is left was measured before a fixture was torn down, its lines were recorded at that moment too.
        """
        return self._lines_early if self._left_early is not None else probe.left(index, _LINES)

    def _left_for_good(self, probe: Probe) -> tuple[int, ...]:
        """Return the bytes that the test left, measured again after a clean-up if they exceed the limit."""
        left = self._left(probe)
        if self._limit is not None and max(left, default=0) > self._limit:
            # Neither garbage in reference cycles nor the allocator's cache is a leak.
            gc.collect()
            probe.release()
            left = self._left(probe)
        return left

    def _left(self, probe: Probe) -> tuple[int, ...]:
        """Return the growth since the test began, without what live fixtures added; negative where memory was freed."""
        assert self._start is not None
        now = _difference(probe.allocated(), self._held_by_fixtures())
        return _difference(now, _difference(self._start, self._start_live))

    def _held_by_fixtures(self) -> tuple[int, ...]:
        return _sum(share.sizes for share in self._live.values())

    def _forget(self, now: tuple[int, ...]) -> None:
        """Subtract from the residue what was freed since the last look, as when a failed test's traceback goes."""
        freed = _at_least_0(_difference(self._end, now))
        self._residue = _at_least_0(_difference(self._residue, freed))
        self._end = now


def _fixtures_of(item: pytest.Item) -> set[int]:
    """Return the ids of the fixture definitions that the test uses, including those from ``getfixturevalue``."""
    request = getattr(item, "_request", None)
    return {id(definition) for definition in getattr(request, "_fixture_defs", {}).values()}


def _sum(many: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Add the sizes device by device; a shorter tuple dates from when fewer devices were in use."""
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
