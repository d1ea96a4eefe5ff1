"""One process that a test started, and the memory that all processes of a test need together on each card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pytest_vram.memory.measurement import Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process below a test: a rank, a worker, a subprocess.

    Attributes:
        pid: its number.
        name: its command line, shortened.
        began: when it started, in seconds since the machine started.
        ended: when it left its figures, in the same seconds; ``None`` while it runs, or if that is unknown.
        rank: its rank in ``torch.distributed``; ``None`` if it has none.
        measurements: its peaks, with one entry for each device that it used.
        missing: why its figures are missing or incomplete; ``""`` if they are complete.
        at_most_bytes: if figures are missing, the most bytes that its allocator had from the driver, on all cards
            together. It cannot have allocated more. ``None`` if that is unknown too.
        left_bytes: what it still held on the cards after the test; ``None`` if it had ended, or if that is unknown.
        left: whether it still ran after the test and held memory on a card.
    """

    pid: int
    name: str
    began: float
    ended: float | None = None
    rank: int | None = None
    measurements: tuple[Measurement, ...] = ()
    missing: str = ""
    at_most_bytes: int | None = None
    left_bytes: int | None = None
    left: bool = False

    @property
    def title(self) -> str:
        """``rank 1 (PID 4711)``, or ``python train.py (PID 4711)``."""
        return f"{self.name if self.rank is None else f'rank {self.rank}'} (PID {self.pid})"


@dataclass(frozen=True, slots=True, kw_only=True)
class CardNeed:
    """The memory that one card had to have for a test.

    Attributes:
        size_bytes: the largest sum of the peaks of processes that lived at the same time; ``None`` if a process does
            not report the metric.
        worst: the measurement with the largest part of it.
        process: the process in which ``worst`` was measured; ``None`` for the test's own process.
        processes: the number of processes of the test that used the card.
    """

    size_bytes: int | None
    worst: Measurement
    process: Process | None
    processes: int


def cards(
    own: Sequence[tuple[int | None, Measurement]],
    processes: Sequence[Process],
    figure: Callable[[Measurement], int | None],
    *,
    each: bool = False,
) -> list[CardNeed]:
    """Return what each card had to hold for the test's own process and for the processes below it.

    The peaks of processes that lived at the same time are added. The sum is an upper bound of what the card held,
    because the peaks may have been at different moments. Processes that lived one after another are not added.

    Args:
        own: figure and measurement of the test's own process, with one entry for each device.
        processes: the others.
        figure: a measurement's value in the metric that is asked for, in bytes.
        each: take each process by itself, even if several share a card: one entry for each process and device.

    Returns:
        The entries, the largest first.
    """
    parts: dict[str, list[tuple[int | None, Measurement, Process | None]]] = {}
    for size, measurement in own:
        parts.setdefault(_card(measurement), []).append((size, measurement, None))
    for process in processes:
        for measurement in process.measurements:
            # The host's memory stands for a card: each rank has one of its own.
            card = f"host:{process.pid}" if measurement.device.kind == "host" else _card(measurement)
            parts.setdefault(card, []).append((figure(measurement), measurement, process))
    found = []
    for members in parts.values():
        used = [part for part in members if part[0] != 0 or part[2] is None]
        groups = [[part] for part in used] if each else [used]
        found += [_together(group) for group in groups if group]
    return sorted(found, key=lambda card: -(card.size_bytes or 0))


def cards_of(
    measurements: Sequence[Measurement], processes: Sequence[Process], metric: str, *, each: bool = False
) -> list[CardNeed]:
    """Return :func:`cards` for a test's record in a metric, such as ``allocated``."""

    def figure(measurement: Measurement) -> int | None:
        return measurement.figure(metric)

    return cards([(figure(m), m) for m in measurements], processes, figure, each=each)


def imbalance(sizes: Sequence[int]) -> float | None:
    """Return how much more the largest rank needs than the mean: 0.25 is 25% more. ``None`` for fewer than two."""
    if len(sizes) < 2 or not sum(sizes):
        return None
    return max(sizes) / (sum(sizes) / len(sizes)) - 1


def _card(measurement: Measurement) -> str:
    """Return a name of the card that is the same in processes that see it under different numbers."""
    device = measurement.device
    return device.uuid or f"{device.kind}:{device.index}"


def _together(group: list[tuple[int | None, Measurement, Process | None]]) -> CardNeed:
    _, worst, process = max(group, key=lambda part: part[0] or 0)
    users = len([part for part in group if part[0] or part[2] is not None])
    if any(size is None for size, _, _ in group):
        return CardNeed(size_bytes=None, worst=worst, process=process, processes=users)
    always = sum(size or 0 for size, _, member in group if member is None)
    lives = [(size or 0, member) for size, _, member in group if member is not None]
    most = max(
        (sum(size for size, other in lives if _alive(other, member.began)) for _, member in lives),
        default=0,
    )
    return CardNeed(size_bytes=always + most, worst=worst, process=process, processes=users)


def _alive(process: Process, moment: float) -> bool:
    return process.began <= moment and (process.ended is None or moment < process.ended)
