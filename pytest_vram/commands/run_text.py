"""Render the figures of a dry run as text for a terminal."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from pytest_vram.commands.run_summary import ADDED_UP, is_guess
from pytest_vram.memory.note import note_lines
from pytest_vram.report.likely import words
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_vram.commands.run_processes import RunProcess
    from pytest_vram.commands.run_summary import DeviceFigures, RunReport
    from pytest_vram.memory.measurement import HostRead
    from pytest_vram.memory.work import Work

_MOST_READS = _MOST_PROCESSES = 12
_COMMAND = 48  # characters of a process's command line


def render(report: RunReport) -> str:
    """Return the report as text, several lines without a final newline."""
    kind = "allocator-exact" if report.exact else "the allocator's figures, under the assumptions below"
    lines = ["", f"=== dry run on {report.count} x {report.product}: {kind}; nothing was computed ==="]
    if not report.devices:
        lines.append("no process used the GPU and left its figures")
    for device in report.devices:
        lines += _render_device(device, report)
    if report.outcome == "unknown":
        lines.append(f"UNKNOWN whether it fits: {'; '.join(report.faults)}")
    elif report.faults and report.outcome == "does not fit":
        lines.append(f"failed: {'; '.join(report.faults)}")
    if report.out_of_memory:
        lines.append(f"OUT OF MEMORY: {report.out_of_memory}")
    lines += _render_processes(report)
    lines += _render_reads(report.host_reads)
    if report.missing_functions:
        lines.append(f"CUDA functions that the dry GPU has not got: {', '.join(report.missing_functions)}")
    if report.notes:
        lines += ["assumptions:", *(f"  {line}" for line in note_lines(report.notes))]
    lines.append(f"{'ended with':<18} {report.ended} after {report.seconds:.1f} s")
    return "\n".join(lines)


def _render_device(device: DeviceFigures, report: RunReport) -> list[str]:
    heading = f"GPU {device.index}"
    if device.at_once > 1:
        lived = (
            f"{device.processes} processes"
            if device.at_once == device.processes
            else (f"{device.processes} processes, at most {device.at_once} at once")
        )
        heading += f", {lived}: {ADDED_UP}"
    elif device.processes > 1:
        heading += f", {device.processes} processes, one after another: the largest counts"
    lines = [heading] if len(report.devices) > 1 or device.processes > 1 or device.index else []
    lines += [
        f"{'peak allocated':<18} {format_bytes(device.peak_allocated_bytes)}",
        f"{'peak reserved':<18} {format_bytes(device.peak_reserved_bytes)}",
        f"{'peak on device':<18} {format_bytes(device.peak_device_bytes)}"
        f" (with {format_bytes(device.context_bytes)} of CUDA context{_nccl(device)}): {_verdict(device, report)}",
    ]
    if (spread := report.spread(device)) is not None:
        lines.append(f"{'likely':<18} {words(spread)}")
    if report.context_caveat:
        lines.append(f"{'context':<18} {report.context_caveat}")
    if device.managed_bytes:
        lines.append(f"{'managed (paged)':<18} {format_bytes(device.managed_bytes)}, not counted above")
    if device.num_alloc_retries:
        lines.append(
            f"{'cache flushes':<18} {device.num_alloc_retries} (before an allocation was satisfied or refused)"
        )
    return lines + _render_work(device.work)


def _nccl(device: DeviceFigures) -> str:
    return f" and {format_bytes(device.nccl_bytes)} of NCCL's buffers" if device.nccl_bytes else ""


def _render_work(work: Work) -> list[str]:
    """Render the kernels, copies and waits of one card, a line for each kind."""
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


def _verdict(device: DeviceFigures, report: RunReport) -> str:
    spare = device.total_bytes - device.peak_device_bytes
    total = format_bytes(device.total_bytes)
    refusals = f"{device.num_ooms} out-of-memory error{'s' if device.num_ooms > 1 else ''}"
    likely = report.is_likely(device)
    if spare < 0:
        return f"{'LIKELY ' if likely else ''}DOES NOT FIT {total}: {format_bytes(-spare)} too much"
    if device.num_ooms and report.outcome == "does not fit":
        return f"DID NOT FIT: {refusals}"
    if device.num_ooms:
        return (
            f"{'fits' if report.outcome == 'fits' else 'held at most this of'} {total} after {refusals}: the card was"
            " full then, and the program went on with less"
        )
    if report.outcome == "unknown":
        return f"{format_bytes(spare)} of {total} were left as far as is known"
    return f"{'likely ' if likely else ''}fits {total} with {format_bytes(spare)} to spare"


def _render_processes(report: RunReport) -> list[str]:
    """Render a line for each process that used a card, and each failed rank, if there are at least two of them."""
    shown = [p for p in report.processes if p.used_seconds is not None or (p.rank is not None and p.fault)]
    if len(shown) < 2:
        return []
    lines = ["processes:", *(f"  {_process_line(process)}" for process in shown[:_MOST_PROCESSES])]
    if len(shown) > _MOST_PROCESSES:
        lines.append(f"  and {len(shown) - _MOST_PROCESSES} more (--json lists all)")
    return lines


def _process_line(process: RunProcess) -> str:
    end = "?" if process.ended_seconds is None else f"{process.ended_seconds:.1f} s"
    start = process.started_seconds if process.used_seconds is None else process.used_seconds
    held = ", ".join(
        f"{format_bytes(device.peak_device_bytes)} on GPU {device.index}" for device in process.devices or ()
    )
    lived = f"from {start:.1f} s to {end}" + (" (end not known: taken to live on)" if end == "?" else "")
    command = shlex.join(process.argv)
    command = command if len(command) <= _COMMAND else f"{command[: _COMMAND - 1]}…"
    return f"{process.name}, {lived}: {held or 'no figures'}; {process.ended}  {command}".rstrip()


def _render_reads(reads: Sequence[HostRead]) -> list[str]:
    """Render host reads: those with the program's own value are only counted, guesses are listed."""
    guessed = [read for read in reads if is_guess(read)]
    right = sum(read.count for read in reads) - sum(read.count for read in guessed)
    if not guessed:
        return [f"{'host reads':<18} {right}, all answered with the program's own values"] if reads else []
    lines = [f"{'host reads':<18} {right} answered with the program's own values; the figures rest on these guesses:"]
    lines += [f"  {read.count:>6} x {read.operation}, {read.location}: {read.note}" for read in guessed[:_MOST_READS]]
    if len(guessed) > _MOST_READS:
        lines.append(f"  and {len(guessed) - _MOST_READS} more places (--json lists all)")
    return lines
