"""Compare two measurements of one test: what changed, by category and by line of code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_vram.memory import Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderChange:
    """One category or line of code: the bytes that it held at the peak, before and after."""

    name: str
    before_bytes: int
    after_bytes: int

    @property
    def change_bytes(self) -> int:
        """The growth in bytes, which is negative if the part shrank."""
        return self.after_bytes - self.before_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderChanges:
    """The changes of one test, the largest first. A list is empty if one of the measurements did not record it."""

    categories: tuple[HolderChange, ...] = ()
    lines: tuple[HolderChange, ...] = ()


def between(old: Measurement | None, new: Measurement) -> HolderChanges | None:
    """Return what changed, or None without an earlier measurement on the same card by the same kind of probe."""
    if old is None or (old.device.kind, old.device.name) != (new.device.kind, new.device.name):
        return None
    return HolderChanges(
        categories=_parts(
            list(old.timeline.at_peak().items()) if old.timeline else [],
            list(new.timeline.at_peak().items()) if new.timeline else [],
        ),
        lines=_parts(
            [(h.location, h.size_bytes) for h in old.holders], [(h.location, h.size_bytes) for h in new.holders]
        ),
    )


def _parts(old: Sequence[tuple[str, int]], new: Sequence[tuple[str, int]]) -> tuple[HolderChange, ...]:
    if not old or not new:
        return ()
    sums: dict[str, list[int]] = {}
    for position, pairs in enumerate((old, new)):
        for name, size in pairs:
            sums.setdefault(name, [0, 0])[position] += size
    found = [HolderChange(name=name, before_bytes=sizes[0], after_bytes=sizes[1]) for name, sizes in sums.items()]
    return tuple(sorted(found, key=lambda part: (-abs(part.change_bytes), part.name)))
