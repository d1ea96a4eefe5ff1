"""A test's processes: which count for the test, what each card had to hold for them, and the lines that report it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_vram.memory.process import cards, imbalance
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_vram.memory import Budget, Measurement, Process
    from pytest_vram.memory.process import CardNeed

_TICK = 0.01  # the start of a process is known to a hundredth of a second, rounded down
_SHOWN = 8
CHILD_VARIABLE = "PYTEST_VRAM_RANK_CHILD"
"""The variable that holds the rank in a process that ``vram_ranks`` started; the marker is ignored in that process."""


def since(process: Process, moment: float) -> bool:
    """Return whether a process started at that moment or later; both are in seconds since the machine started."""
    return process.began + _TICK >= moment


def held(
    budget: Budget,
    measurements: Sequence[Measurement],
    processes: Sequence[Process],
    counted: Callable[[Measurement], int | None],
) -> list[CardNeed]:
    """Return what counts against a budget, card by card, the largest first.

    Args:
        budget: the budget, whose metric, device and ``ranks`` decide what counts.
        measurements: the measurements of the test's own process.
        processes: the child processes that count for the test.
        counted: returns the figure of a measurement of the test's own process.
    """
    own = [(counted(m), m) for m in measurements]
    found = cards(own, processes, lambda m: m.figure(budget.metric), each=budget.ranks == "each")
    if budget.device is None:
        return found
    chosen = {m.device.uuid or m.device.index for m in measurements if m.device.index == budget.device}
    return [card for card in found if (card.worst.device.uuid or card.worst.device.index) in chosen]


def unknown(processes: Sequence[Process]) -> str | None:
    """Return why the test cannot be judged if a process that used the GPU left no figures, or None."""
    missing = [process for process in processes if process.missing]
    if not missing:
        return None
    more = f", and {len(missing) - 1} more processes" if len(missing) > 1 else ""
    return f"the figures of {missing[0].title} are missing: {missing[0].missing}{more}"


def at_most(processes: Sequence[Process]) -> int | None:
    """Return the most that the processes without figures held together, in bytes, or None if one has no upper bound."""
    sizes = [process.at_most_bytes for process in processes if process.missing]
    return None if None in sizes else sum(size or 0 for size in sizes)


def lines(processes: Sequence[Process], metric: str) -> list[str]:
    """Return a line for each process, the largest first, and one for how far the largest rank is above the mean."""
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
    """Return a process's peak on the device on which it needed most, or None if it has no figure."""
    sizes = [size for m in process.measurements if (size := m.figure(metric)) is not None]
    return max(sizes, default=None)


def left_text(process: Process) -> str:
    """Return a text such as ``python server.py (PID 4711) holds 1.00 GiB``."""
    size = "memory" if process.left_bytes is None else format_bytes(process.left_bytes)
    return f"{process.title} holds {size}"


def _on(process: Process) -> str:
    if process.missing:
        return f": {process.missing}"
    return f"  on cuda:{','.join(str(m.device.index) for m in process.measurements)}" if process.measurements else ""
