"""The figures of a dry run: put together from its processes, then written for people and for programs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_vram.memory.measurement import HostRead, Work
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_vram.drygpu.cards import Card

Record = dict[str, Any]

_MOST_READS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFigures:
    """One card of a dry run. Sizes in bytes; with several processes on the card, the sum of their peaks.

    Attributes:
        index: the card's number.
        processes: how many processes used it.
        peak_allocated_bytes: peak of live blocks.
        peak_reserved_bytes: peak of what the allocator held.
        peak_device_bytes: peak of everything on the card, contexts included.
        context_bytes: the contexts' part of it.
        managed_bytes: peak of managed (paged) memory, which is not counted in ``peak_device_bytes``.
        total_bytes: what the card has.
        num_alloc_retries: how often the cache was flushed to satisfy an allocation.
        num_ooms: how often the allocator raised OutOfMemoryError.
        work: kernels, copies and waits; with several processes on the card, of all of them.
    """

    index: int
    processes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_device_bytes: int
    context_bytes: int
    managed_bytes: int
    total_bytes: int
    num_alloc_retries: int
    num_ooms: int
    work: Work | None = None

    @property
    def fits(self) -> bool:
        """The card has room for it, and the allocator never refused."""
        return self.peak_device_bytes <= self.total_bytes and self.num_ooms == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """A dry run.

    ``devices`` is empty when the program used no GPU; ``signal`` is set when one ended it; ``missing_functions`` are
    CUDA functions that the program asked for in vain, ``not_counted`` the libraries whose workspaces are left out.
    """

    gpu: str
    product: str
    count: int
    alloc_conf: str | None
    devices: tuple[DeviceFigures, ...]
    host_reads: tuple[HostRead, ...]
    missing_functions: tuple[str, ...]
    not_counted: tuple[str, ...]
    out_of_memory: str
    exit_code: int
    signal: int | None
    seconds: float
    versions: Mapping[str, str | None]
    recorded: Mapping[int, Record] = field(default_factory=dict)
    """Memory over time and who held the peak, by card, where it was asked for: of the process that held most."""

    @property
    def worst(self) -> DeviceFigures | None:
        """The card that held the most."""
        return max(self.devices, key=lambda device: device.peak_device_bytes, default=None)

    @property
    def fits(self) -> bool | None:
        """Every card had room; ``None`` when no GPU was used."""
        return all(device.fits for device in self.devices) if self.devices else None

    def as_json(self) -> dict[str, Any]:
        """The report as plain data. The figures at the top are those of the card that held the most."""
        names = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes", "managed_bytes", "total_bytes")
        worst = self.worst
        return {
            "kind": "dry",
            "gpu": self.gpu,
            "product": self.product,
            "count": self.count,
            "alloc_conf": self.alloc_conf,
            **{name: None if worst is None else getattr(worst, name) for name in names},
            **({} if worst is None or worst.work is None else asdict(worst.work)),
            "num_alloc_retries": sum(device.num_alloc_retries for device in self.devices),
            "num_ooms": sum(device.num_ooms for device in self.devices),
            "fits": self.fits,
            "out_of_memory": self.out_of_memory or None,
            "exit_code": self.exit_code,
            "signal": self.signal,
            "seconds": round(self.seconds, 3),
            "devices": [asdict(device) for device in self.devices],
            "host_reads": [asdict(read) for read in self.host_reads],
            "missing_functions": list(self.missing_functions),
            "not_counted": list(self.not_counted),
            "versions": dict(self.versions),
        }


def combine(
    records: Sequence[Record],
    *,
    card: Card,
    count: int,
    total_bytes: int | None,
    code: int,
    seconds: float,
    conf: str | None,
) -> RunReport:
    """Put the records of a run's processes together. ``code`` is ``Popen.returncode``: negative for a signal."""
    by_card: dict[int, list[Record]] = defaultdict(list)
    reads: dict[tuple[str, str, bool, str], int] = defaultdict(int)
    missing: dict[str, None] = {}
    not_counted: dict[str, None] = {}
    for record in records:
        for device in record["devices"]:
            by_card[device["index"]].append(device)
        for read in record["host_reads"]:
            reads[(read["location"], read["operation"], read["answered"], read["note"])] += read["count"]
        missing.update(dict.fromkeys(record["missing_functions"]))
        not_counted.update(dict.fromkeys(record["not_counted"]))
    return RunReport(
        gpu=card.name,
        product=card.product,
        count=count,
        alloc_conf=conf,
        devices=tuple(_figures(index, by_card[index], total_bytes or card.total_bytes) for index in sorted(by_card)),
        host_reads=tuple(
            HostRead(location=where, operation=what, answered=answered, note=note, count=times)
            for (where, what, answered, note), times in sorted(reads.items(), key=lambda item: (item[0][2], -item[1]))
        ),
        missing_functions=tuple(missing),
        not_counted=tuple(not_counted),
        out_of_memory=next((record["out_of_memory"] for record in records if record["out_of_memory"]), ""),
        exit_code=code if code >= 0 else 128 - code,
        signal=-code if code < 0 else None,
        seconds=seconds,
        versions=records[0]["versions"] if records else {},
        recorded={index: found for index, devices in by_card.items() if (found := _recorded(devices))},
    )


def _recorded(records: Sequence[Record]) -> Record | None:
    largest = max(records, key=lambda record: int(record["peak_allocated_bytes"]))
    found: Record | None = largest.get("recorded")
    return found


def _figures(index: int, records: Sequence[Record], total_bytes: int) -> DeviceFigures:
    def total(name: str) -> int:
        return sum(record[name] for record in records)

    return DeviceFigures(
        index=index,
        processes=len(records),
        peak_allocated_bytes=total("peak_allocated_bytes"),
        peak_reserved_bytes=total("peak_reserved_bytes"),
        peak_device_bytes=total("peak_device_bytes"),
        context_bytes=total("context_bytes"),
        managed_bytes=total("managed_bytes"),
        total_bytes=total_bytes,
        num_alloc_retries=total("num_alloc_retries"),
        num_ooms=total("num_ooms"),
        work=sum((Work(**record["work"]) for record in records if "work" in record), Work())
        if any("work" in record for record in records)
        else None,
    )


def render(report: RunReport) -> str:
    """The report as text for a terminal."""
    lines = ["", f"=== dry run on {report.count} x {report.product}: allocator-exact, nothing was computed ==="]
    if not report.devices:
        lines.append("no process used the GPU (or it was killed before it could leave its figures)")
    for device in report.devices:
        lines += _render_device(device, several=len(report.devices) > 1)
    if report.out_of_memory:
        lines.append(f"OUT OF MEMORY: {report.out_of_memory}")
    lines += _render_reads(report.host_reads)
    if report.missing_functions:
        lines.append(f"CUDA functions that the dry GPU has not got: {', '.join(report.missing_functions)}")
    if report.not_counted:
        lines.append(f"not counted: workspace of {', '.join(report.not_counted)}")
    ended = f"signal {report.signal}" if report.signal is not None else f"exit code {report.exit_code}"
    lines.append(f"{'ended with':<18} {ended} after {report.seconds:.1f} s")
    return "\n".join(lines)


def _render_device(device: DeviceFigures, *, several: bool) -> list[str]:
    spare = device.total_bytes - device.peak_device_bytes
    if device.num_ooms:
        verdict = f"DID NOT FIT: {device.num_ooms} out-of-memory error{'s' if device.num_ooms > 1 else ''}"
    elif spare >= 0:
        verdict = f"fits {format_bytes(device.total_bytes)} with {format_bytes(spare)} to spare"
    else:
        verdict = f"DOES NOT FIT {format_bytes(device.total_bytes)}: {format_bytes(-spare)} too much"
    shared = f", {device.processes} processes: the sum of their peaks" if device.processes > 1 else ""
    lines = [f"GPU {device.index}{shared}"] if several or shared else []
    lines += [
        f"{'peak allocated':<18} {format_bytes(device.peak_allocated_bytes)}",
        f"{'peak reserved':<18} {format_bytes(device.peak_reserved_bytes)}",
        f"{'peak on device':<18} {format_bytes(device.peak_device_bytes)}"
        f" (with {format_bytes(device.context_bytes)} of CUDA context): {verdict}",
    ]
    if device.managed_bytes:
        lines.append(f"{'managed (paged)':<18} {format_bytes(device.managed_bytes)}, not counted above")
    if device.num_alloc_retries:
        lines.append(f"{'cache flushes':<18} {device.num_alloc_retries} (allocations that succeeded only after one)")
    return lines if device.work is None else [*lines, *_render_work(device.work)]


def _render_work(work: Work) -> list[str]:
    graphs = f", in {work.graph_launches:,} CUDA graphs and one by one" if work.graph_launches else ""
    lines = [f"{'kernels launched':<18} {work.launches:,}{graphs}"]
    for name, count, size in (
        ("copied to device", work.copies_to_device, work.copied_to_device_bytes),
        ("copied to host", work.copies_to_host, work.copied_to_host_bytes),
    ):
        lines.append(f"{name:<18} {format_bytes(size)} in {count:,} {'copy' if count == 1 else 'copies'}")
    times = "time" if work.synchronizations == 1 else "times"
    lines.append(f"{'waits for device':<18} {work.synchronizations:,} {times}")
    return lines


def _render_reads(reads: Sequence[HostRead]) -> list[str]:
    """Reads whose answer is the program's own value need no attention: they are only counted."""
    guessed = [read for read in reads if not read.answered or _is_guess(read)]
    right = sum(read.count for read in reads) - sum(read.count for read in guessed)
    if not guessed:
        return [f"{'host reads':<18} {right}, all answered with the program's own values"] if reads else []
    lines = [f"{'host reads':<18} {right} answered with the program's own values; the figures rest on these guesses:"]
    lines += [f"  {read.count:>6} x {read.operation}, {read.location}: {read.note}" for read in guessed[:_MOST_READS]]
    if len(guessed) > _MOST_READS:
        lines.append(f"  and {len(guessed) - _MOST_READS} more places (--json lists all)")
    return lines


def _is_guess(read: HostRead) -> bool:
    return " taken as " in read.note
