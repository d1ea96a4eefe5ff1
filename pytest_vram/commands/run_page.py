"""Convert a dry run to a report with one test, whose budget is the card, so that the HTML page can show it."""

from __future__ import annotations

import platform
import shlex
from typing import TYPE_CHECKING

from pytest_vram.commands.run_processes import concerned
from pytest_vram.commands.run_summary import ADDED_UP
from pytest_vram.drygpu.cards import context_notes
from pytest_vram.memory import (
    Budget,
    Device,
    Environment,
    Exceeded,
    Measurement,
    Note,
    Peak,
    ProcessPeak,
    Report,
    TestRecord,
    Verdict,
    Within,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_vram.commands.run_processes import RunProcess
    from pytest_vram.commands.run_summary import DeviceFigures, RunReport
    from pytest_vram.memory.run_record import CardFigures


def as_report(run: RunReport, command: Sequence[str]) -> Report:
    """Return a report whose only test is the run; its budget is the memory of the card."""
    devices = tuple(Device(kind="dry", index=d.index, name=run.product, total_bytes=d.total_bytes) for d in run.devices)
    measurements = tuple(
        _measurement(figures, device, run) for figures, device in zip(run.devices, devices, strict=True)
    )
    versions = run.versions
    environment = Environment(
        python=versions.get("python") or platform.python_version(),
        pytest_vram=versions.get("pytest_vram") or "",
        torch=versions.get("torch"),
        cuda=versions.get("cuda"),
        allocator_conf=run.alloc_conf,
        devices=devices,
    )
    sound = run.exit_code == 0 and run.outcome in ("fits", "no GPU used")
    return held_against_card(shlex.join(command), measurements, environment, sound=sound)


def held_against_card(
    name: str, measurements: Sequence[Measurement], environment: Environment, *, sound: bool
) -> Report:
    """Return a report with one test, whose budget is the memory of the card with the largest peak.

    The budget's metric is ``device``, which includes the context.

    Args:
        name: name of the test, such as a command line.
        measurements: one measurement for each device.
        environment: the versions and devices of the run.
        sound: whether the program ran to its end.
    """
    worst = max(measurements, key=lambda found: found.peak.device_bytes or 0, default=None)
    budget: Budget | None = None
    verdict: Verdict | None = None
    if worst is not None and worst.device.total_bytes is not None:
        budget = Budget(limit_bytes=worst.device.total_bytes, metric="device", origin="card", where=worst.device.name)
        spare = worst.device.total_bytes - (worst.peak.device_bytes or 0)
        verdict = Within(headroom_bytes=spare) if spare >= 0 else Exceeded(over_bytes=-spare)
    test = TestRecord(
        nodeid=name,
        outcome="passed" if sound else "failed",
        budget=budget,
        measurements=tuple(measurements),
        verdict=verdict,
    )
    return Report(environment=environment, tests=(test,))


def _measurement(figures: DeviceFigures, device: Device, run: RunReport) -> Measurement:
    recorded = run.recorded.get(figures.index)
    return Measurement(
        device=device,
        peak=_peak(figures),
        holders=recorded.holders if recorded else (),
        timeline=recorded.timeline if recorded else None,
        retries=figures.num_alloc_retries,
        ooms=figures.num_ooms,
        work=figures.work,
        host_reads=run.host_reads if figures.index == run.devices[0].index else (),
        notes=(*run.notes, *_notes(figures, run)),
        processes=tuple(found for process in run.processes if (found := _process(process, figures.index))),
    )


def _peak(figures: CardFigures) -> Peak:
    return Peak(
        allocated_bytes=figures.peak_allocated_bytes,
        reserved_bytes=figures.peak_reserved_bytes,
        device_bytes=figures.peak_device_bytes,
    )


def _notes(figures: DeviceFigures, run: RunReport) -> list[Note]:
    """Return notes about the context, added peaks, missing CUDA functions, and processes without sound figures."""
    found = [*context_notes(run.product), *(Note(name="processes", text=fault, source="run") for fault in run.faults)]
    if figures.at_once > 1:
        found.append(Note(name=f"GPU {figures.index}", text=ADDED_UP, source="run"))
    if run.missing_functions:
        text = f"the dry GPU has not got {', '.join(run.missing_functions)}"
        found.append(Note(name="CUDA functions", text=text, source="driver"))
    return found


def _process(process: RunProcess, index: int) -> ProcessPeak | None:
    """Return a process's peaks on one card; None if it did not use the card.

    If a process left no figures, its card is unknown, so it is listed with every card.
    """
    figures = next((device for device in process.devices or () if device.index == index), None)
    unknown = process.devices is None and bool(process.fault) and process in concerned([process])
    if figures is None and not unknown:
        return None
    return ProcessPeak(
        pid=process.pid,
        rank=process.rank,
        peak=_peak(figures) if figures is not None else Peak(),
        start=process.used_seconds,
        end=process.ended_seconds,
        ended=process.ended,
    )
