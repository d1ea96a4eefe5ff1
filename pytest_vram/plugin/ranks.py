"""A test's processes: which are the test's own, what each card had to hold for them, and how it is told."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_vram.memory import TestRecord
from pytest_vram.memory.codec import decode, encode
from pytest_vram.memory.process import cards, imbalance
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytest

    from pytest_vram.memory import Budget, Measurement, Process
    from pytest_vram.memory.process import Card

_TICK = 0.01  # seconds: a process's start is known to a hundredth, rounded down
_SHOWN = 8
CHILD_VARIABLE = "PYTEST_VRAM_RANK_CHILD"
"""Set in the process of a rank that ``vram_ranks`` started, to the rank: the marker means nothing more there."""
PROPERTY = "vram"
"""The name under which a test's record travels in its ``user_properties``."""


def since(process: Process, moment: float) -> bool:
    """Whether a process started at that moment or later; both in seconds since the machine started."""
    return process.began + _TICK >= moment


def held(
    budget: Budget,
    measurements: Sequence[Measurement],
    processes: Sequence[Process],
    counted: Callable[[Measurement], int | None],
) -> list[Card]:
    """What counts against a budget, card by card, the largest first.

    Args:
        budget: its metric, device and ``ranks`` decide.
        measurements: of the test's own process.
        processes: those below it.
        counted: the figure of a measurement of the test's own process.
    """
    own = [(counted(m), m) for m in measurements]
    found = cards(own, processes, lambda m: m.figure(budget.metric), each=budget.ranks == "each")
    if budget.device is None:
        return found
    chosen = {m.device.uuid or m.device.index for m in measurements if m.device.index == budget.device}
    return [card for card in found if (card.worst.device.uuid or card.worst.device.index) in chosen]


def unknown(processes: Sequence[Process]) -> str | None:
    """Why the test cannot be judged, if a process that used the GPU left no figures."""
    missing = [process for process in processes if process.missing]
    if not missing:
        return None
    more = f", and {len(missing) - 1} more processes" if len(missing) > 1 else ""
    return f"the figures of {missing[0].title} are missing: {missing[0].missing}{more}"


def at_most(processes: Sequence[Process]) -> int | None:
    """What the processes without figures had together at most, in bytes; ``None`` where nothing is known of one."""
    sizes = [process.at_most_bytes for process in processes if process.missing]
    return None if None in sizes else sum(size or 0 for size in sizes)


def lines(processes: Sequence[Process], metric: str) -> list[str]:
    """Processes side by side, the largest first, and by how much the largest is above the mean."""
    sized = [(process, figure(process, metric)) for process in processes]
    sized.sort(key=lambda pair: -(pair[1] or 0))
    found = [f"    {format_bytes(size):>9}  {process.title}{_on(process)}" for process, size in sized[:_SHOWN]]
    if len(sized) > _SHOWN:
        found.append(f"    and {len(sized) - _SHOWN} more processes")
    uneven = imbalance([size for process, size in sized if size is not None and process.rank is not None])
    if uneven is not None:
        found.append(f"    the largest rank needs {uneven:.1%} more than the mean of the ranks")
    return found


def figure(process: Process, metric: str) -> int | None:
    """A process's peak on the device on which it needed most; ``None`` where there is no figure."""
    sizes = [size for m in process.measurements if (size := m.figure(metric)) is not None]
    return max(sizes, default=None)


def add_left(item: pytest.Item, left: Sequence[Process]) -> None:
    """Say in the test's record which of its processes still run, and what they hold."""
    for index, (name, text) in enumerate(item.user_properties):
        if name == PROPERTY:
            record = decode(TestRecord, json.loads(str(text)))
            still = {process.pid: process for process in left}
            known = tuple(
                replace(p, left=True, left_bytes=still.pop(p.pid).left_bytes) if p.pid in still else p
                for p in record.processes
            )
            record = replace(record, processes=(*known, *still.values()))
            item.user_properties[index] = (name, json.dumps(encode(record), separators=(",", ":")))


def left_text(process: Process) -> str:
    """``python server.py (PID 4711) holds 1.00 GiB``."""
    size = "memory" if process.left_bytes is None else format_bytes(process.left_bytes)
    return f"{process.title} holds {size}"


def _on(process: Process) -> str:
    if process.missing:
        return f": {process.missing}"
    return f"  on cuda:{','.join(str(m.device.index) for m in process.measurements)}" if process.measurements else ""
