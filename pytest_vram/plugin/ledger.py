"""What fixtures hold, and what tests leave behind."""

from __future__ import annotations

import gc
import json
from typing import TYPE_CHECKING, Any

from pytest_vram.errors import VramLeak
from pytest_vram.memory import FixtureShare
from pytest_vram.plugin.judge import PROPERTY, judged
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    import pytest

    from pytest_vram.plugin.meter import Meter
    from pytest_vram.probe.protocol import Probe


class Ledger:
    """Keeps account of memory that outlives a test, in one process."""

    def __init__(self) -> None:
        self._live: dict[int, FixtureShare] = {}
        self._residue: tuple[int, ...] = ()
        self._end: tuple[int, ...] = ()
        self._nested: list[int] = []

    def fixture_begins(self, probe: Probe) -> int:
        """A fixture is about to be set up; returns what is held now, for :meth:`fixture_is_up`."""
        self._nested.append(0)
        return max(probe.allocated(), default=0)

    def fixture_is_up(self, fixturedef: pytest.FixtureDef[Any], probe: Probe, before: int) -> None:
        """A fixture is set up: what it added is its share, without that of fixtures that it set up itself."""
        inner = self._nested.pop()
        grown = max(probe.allocated(), default=0) - before
        if self._nested:
            self._nested[-1] += grown
        if grown - inner > 0:
            name = fixturedef.argname.removeprefix("_unittest_").removeprefix("_xunit_")
            self._live[id(fixturedef)] = FixtureShare(name=name, scope=fixturedef.scope, size_bytes=grown - inner)

    def fixture_is_gone(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        """A fixture was torn down."""
        self._live.pop(id(fixturedef), None)

    def residue(self, now: tuple[int, ...]) -> tuple[int, ...]:
        """Bytes by device that earlier tests left and that are still there; ``now`` is what is held."""
        self._note_freed(now)
        return tuple(min(r, n) for r, n in zip(self._residue, now, strict=False))

    def share(self, item: pytest.Item, meter: Meter) -> None:
        """Tell the meter which fixtures are the test's own, and what the others hold."""
        used = _fixtures_of(item)
        meter.fixtures = tuple(share for key, share in self._live.items() if key in used)
        meter.others_bytes = sum(share.size_bytes for key, share in self._live.items() if key not in used)

    def live(self) -> frozenset[int]:
        """Identities of the fixtures that hold something."""
        return frozenset(self._live)

    def close(self, item: pytest.Item, meter: Meter) -> None:
        """End of a test: what is left is its residue, and with ``max_leak_mb`` it is judged.

        Raises:
            VramLeak: it left more than it may.
        """
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
            padded = (*self._residue, *[0] * len(grown))
            self._residue = tuple(r + max(0, min(g, left)) for r, g in zip(padded, grown, strict=False))
        if limit is not None or left > 0:
            self._add_leak(item, left)
        if limit is not None:
            failed = any(p[0] == PROPERTY and '"outcome":"failed"' in str(p[1]) for p in item.user_properties)
            if left > limit and not failed:
                raise judged(
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
        outliving = sum(share.size_bytes for key, share in self._live.items() if key not in meter.earlier_fixtures)
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


def _fixtures_of(item: pytest.Item) -> set[int]:
    """Identities of the fixture definitions that the test uses, those asked for by ``getfixturevalue`` included."""
    request = getattr(item, "_request", None)
    return {id(definition) for definition in getattr(request, "_fixture_defs", {}).values()}
