"""Combine the figures of a dry run's processes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from pytest_vram.commands.run_processes import FIGURES, RunProcess, absent, at_once, concerned
from pytest_vram.drygpu.cards import context_caveat, context_source
from pytest_vram.memory.measurement import HostRead
from pytest_vram.memory.note import merged
from pytest_vram.memory.run_record import CardFigures
from pytest_vram.memory.work import Work
from pytest_vram.report.likely import on_device

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_vram.drygpu.cards import Card
    from pytest_vram.memory.note import Note
    from pytest_vram.memory.run_record import CardRecord, RunRecord
    from pytest_vram.memory.spread import Spread

Outcome = Literal["fits", "does not fit", "unknown", "no GPU used"]

ADDED_UP = "an upper bound: the peaks of processes that lived at the same time are added"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFigures(CardFigures):
    """What all processes of a dry run together needed of one card.

    The peaks of processes that ran at the same time are added, and the largest such sum is the card's figure. It is an
    upper bound, because the peaks may occur at different times. Processes that ran one after another are not added.

    Attributes:
        processes: number of processes that used the card.
        at_once: largest number of them that ran at the same time.
    """

    processes: int
    at_once: int

    @property
    def has_room(self) -> bool:
        """Whether the card has room for the peak."""
        return self.peak_device_bytes <= self.total_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """The result of a dry run.

    ``context_source`` says where the figure of the CUDA context is from. ``context_caveat`` says how far
    it can be trusted, and is empty if it was measured.
    ``devices`` is empty if no process left figures of a GPU. ``signal`` is set if a signal ended the program.
    ``missing_functions`` lists CUDA functions that the program called and the dry GPU lacks. ``notes`` lists the
    assumptions behind the figures. ``absent`` names ranks that a launcher announced and that never imported torch, and
    ``killed_early`` processes that a signal ended before that.
    """

    gpu: str
    product: str
    context_source: str
    context_caveat: str
    count: int
    alloc_conf: str | None
    devices: tuple[DeviceFigures, ...]
    processes: tuple[RunProcess, ...] = ()
    absent: tuple[str, ...] = ()
    killed_early: tuple[str, ...] = ()
    host_reads: tuple[HostRead, ...]
    missing_functions: tuple[str, ...]
    notes: tuple[Note, ...]
    exit_code: int
    signal: int | None
    seconds: float
    versions: Mapping[str, str | None]
    recorded: Mapping[int, CardRecord] = field(default_factory=dict)
    """By card, the process with the largest peak, whose memory over time is shown. Empty if it was not recorded."""

    @property
    def worst(self) -> DeviceFigures | None:
        """The card with the largest peak; None if no card was used."""
        return max(self.devices, key=lambda device: device.peak_device_bytes, default=None)

    @property
    def out_of_memory(self) -> str:
        """The message of the first out-of-memory error that was not caught; ``""`` if there was none."""
        return next((process.out_of_memory for process in self.processes if process.out_of_memory), "")

    @property
    def ended(self) -> str:
        """How the program ended, such as ``signal 9`` or ``exit code 0``."""
        return f"signal {self.signal}" if self.signal is not None else f"exit code {self.exit_code}"

    @property
    def faults(self) -> tuple[str, ...]:
        """Why the figures may be too small: processes that left no figures or did not run to their end."""
        found = [f"{process.name} {process.fault}" for process in concerned(self.processes) if process.fault]
        found += self.absent
        if not found and self.exit_code:
            found += [*self.killed_early, f"the program ended with {self.ended}"]
        return tuple(found)

    @property
    def lost_a_rank(self) -> bool:
        """Whether a rank did not run to its end, or never began, which a launcher may pass over."""
        return bool(self.absent) or any(p.rank is not None and p.fault for p in concerned(self.processes))

    @property
    def _refused(self) -> bool:
        """Whether an out-of-memory error was not caught, or occurred in a process that failed."""
        failed = bool(self.exit_code) or any(process.fault for process in self.processes if process.refusals)
        return bool(self.out_of_memory) or (failed and any(device.num_ooms for device in self.devices))

    @property
    def outcome(self) -> Outcome:
        """Whether the cards have room for the program.

        ``does not fit``: a peak is above the card's memory, an out-of-memory error was not caught, or one occurred in a
        process that failed. ``unknown``: none of these, but a process failed or left no figures. ``fits``: every
        process ended without an error; the program may have caught out-of-memory errors and gone on with less memory.
        """
        if self._refused or not all(device.has_room for device in self.devices):
            return "does not fit"
        ranks = any(p.used_seconds is not None or p.rank is not None for p in self.processes)
        if not self.devices and not ranks and not (self.exit_code and self.killed_early):
            return "no GPU used"
        return "unknown" if self.faults else "fits"

    @property
    def fits(self) -> bool | None:
        """Whether every card had room; ``None`` if that is unknown or no GPU was used."""
        return {"fits": True, "does not fit": False}.get(self.outcome)

    def spread(self, device: DeviceFigures) -> Spread | None:
        """Return the bounds of ``peak_device_bytes``, or None if nothing tells how far off it may be.

        The assumptions do not change the context, so it is the same in both bounds.
        """
        # Each of several processes that run at once may be off by as much.
        notes = [replace(note, size_bytes=note.size_bytes * device.at_once) for note in self.notes]
        return on_device(device.peak_device_bytes, device.context_bytes, notes)

    @property
    def likely(self) -> bool:
        """Whether the verdict is only likely: it rests on a card whose memory lies between the bounds of its peak.

        A card that is surely too full, or an out-of-memory error, makes ``does not fit`` certain.
        """
        if self.outcome == "fits":
            return any(self.is_likely(device) for device in self.devices)
        full = [device for device in self.devices if not device.has_room]
        return self.outcome == "does not fit" and not self._refused and bool(full) and all(map(self.is_likely, full))

    def is_likely(self, device: DeviceFigures) -> bool:
        """Whether it is only likely that a card has room, or has none: its memory lies between the peak's bounds.

        That is never so of a card that has room and refused a request, nor of one that has room in a run whose verdict
        is unknown.
        """
        spread = self.spread(device)
        if device.has_room and (device.num_ooms or self.outcome == "unknown"):
            return False
        return spread is not None and spread.straddles(device.total_bytes)

    @property
    def exact(self) -> bool:
        """Whether every figure is that of PyTorch's allocator, without an assumption and without added peaks."""
        assumed = any(note.figures for note in self.notes) or bool(self.missing_functions)
        guessed = any(is_guess(read) for read in self.host_reads)
        summed = any(device.at_once > 1 for device in self.devices)
        return not (assumed or guessed or summed or self.faults)

    def as_json(self) -> dict[str, Any]:
        """Return the result as JSON values. The top-level figures are those of the card with the largest peak."""
        names = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes", "managed_bytes", "total_bytes")
        worst = self.worst
        return {
            "kind": "dry",
            "gpu": self.gpu,
            "product": self.product,
            "context_source": self.context_source,
            "context_caveat": self.context_caveat or None,
            "count": self.count,
            "alloc_conf": self.alloc_conf,
            **{name: None if worst is None else getattr(worst, name) for name in names},
            **(asdict(worst.work) if worst else dict.fromkeys(field.name for field in fields(Work))),
            "num_alloc_retries": sum(device.num_alloc_retries for device in self.devices),
            "num_ooms": sum(device.num_ooms for device in self.devices),
            "fits": self.fits,
            "verdict": self.outcome,
            "likely": self.likely,
            "faults": list(self.faults),
            "exact": self.exact,
            "out_of_memory": self.out_of_memory or None,
            "exit_code": self.exit_code,
            "signal": self.signal,
            "seconds": round(self.seconds, 3),
            "devices": [self._device_json(device) for device in self.devices],
            "processes": [_process_json(process) for process in self.processes],
            "host_reads": [asdict(read) for read in self.host_reads],
            "missing_functions": list(self.missing_functions),
            "notes": [asdict(note) for note in self.notes],
            "versions": dict(self.versions),
        }

    def _device_json(self, device: DeviceFigures) -> dict[str, Any]:
        spread = self.spread(device)
        first = {"index": device.index, "processes": device.processes, "at_once": device.at_once}
        return first | asdict(device) | {"peak_device_spread": None if spread is None else asdict(spread)}


def is_guess(read: HostRead) -> bool:
    """Return whether a host read returned a value that is not the program's own."""
    return not read.answered or " taken as " in read.note


def _process_json(process: RunProcess) -> dict[str, Any]:
    keep = ("pid", "rank", "local_rank", "argv", "started_seconds", "used_seconds", "ended_seconds", "exit_code")
    return {
        **{name: getattr(process, name) for name in keep},
        "raised": process.raised or None,
        "ended": process.ended,
        "left_figures": process.devices is not None,
        "devices": [_card_json(card) for card in process.devices or ()],
    }


def _card_json(card: CardRecord) -> dict[str, Any]:
    """Return the figures of a card without its memory over time, which the page shows."""
    plain = asdict(replace(card, timeline=None, holders=()))
    return {name: value for name, value in plain.items() if name not in ("timeline", "holders")}


def combine(
    processes: Sequence[RunProcess],
    records: Sequence[RunRecord],
    *,
    card: Card,
    count: int,
    total_bytes: int | None,
    code: int,
    seconds: float,
    conf: str | None,
    stand_ins: Sequence[Note] = (),
    killed_early: Sequence[str] = (),
) -> RunReport:
    """Combine the processes of a run.

    Args:
        processes: every process that imported torch.
        records: the records of the processes that used a card.
        card: the kind of the dry GPUs.
        count: the number of dry GPUs.
        total_bytes: memory of each dry GPU; ``None`` takes that of ``card``.
        code: ``Popen.returncode`` of the program: negative for a signal.
        seconds: duration of the run.
        conf: settings of the allocator.
        stand_ins: notes about what replaced the program's models and data.
        killed_early: the processes that a signal ended before they had imported torch.
    """
    by_card: dict[int, list[tuple[RunProcess, CardRecord]]] = defaultdict(list)
    for process in processes:
        for device in process.devices or ():
            by_card[device.index].append((process, device))
    reads: dict[tuple[str, str, bool, str], int] = defaultdict(int)
    missing: dict[str, None] = {}
    notes: dict[Note, None] = dict.fromkeys(stand_ins)
    for record in records:
        for read in record.host_reads:
            reads[(read.location, read.operation, read.answered, read.note)] += read.count
        missing.update(dict.fromkeys(record.missing_functions))
        notes.update(dict.fromkeys(record.notes))
    return RunReport(
        gpu=card.name,
        product=card.product,
        context_source=context_source(card),
        context_caveat=context_caveat(card),
        count=count,
        alloc_conf=conf,
        devices=tuple(_figures(index, by_card[index], total_bytes or card.total_bytes) for index in sorted(by_card)),
        processes=tuple(processes),
        absent=tuple(absent(processes)),
        killed_early=tuple(killed_early),
        host_reads=tuple(
            HostRead(location=where, operation=what, answered=answered, note=note, count=times)
            for (where, what, answered, note), times in sorted(reads.items(), key=lambda item: (item[0][2], -item[1]))
        ),
        missing_functions=tuple(missing),
        notes=merged(notes),
        exit_code=code if code >= 0 else 128 - code,
        signal=-code if code < 0 else None,
        seconds=seconds,
        versions=records[0].versions if records else {},
        recorded={index: found for index, shares in by_card.items() if (found := _recorded(shares))},
    )


def _recorded(shares: Sequence[tuple[RunProcess, CardRecord]]) -> CardRecord | None:
    largest = max((figures for _, figures in shares), key=lambda figures: figures.peak_allocated_bytes)
    return None if largest.timeline is None else largest


def _figures(index: int, shares: Sequence[tuple[RunProcess, CardRecord]], total_bytes: int) -> DeviceFigures:
    sums, most = at_once(shares)
    return DeviceFigures(
        index=index,
        processes=len(shares),
        at_once=most,
        **{name: sums[name] for name in FIGURES},
        total_bytes=total_bytes,
        num_alloc_retries=sum(figures.num_alloc_retries for _, figures in shares),
        num_ooms=sum(figures.num_ooms for _, figures in shares),
        work=sum((figures.work for _, figures in shares), Work()),
    )
