"""A dry run as a report, so that it is drawn as a session of tests is: one row a command, the card as its budget."""

from __future__ import annotations

import platform
import shlex
from typing import TYPE_CHECKING, Any

from pytest_vram.memory import (
    Budget,
    Device,
    Environment,
    Exceeded,
    Holder,
    Measurement,
    Peak,
    Report,
    Series,
    TestRecord,
    Timeline,
    Within,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_vram.drygpu.summary import DeviceFigures, RunReport


def as_report(run: RunReport, command: Sequence[str]) -> Report:
    """The run as the only test of a report; its budget is the card, context included."""
    devices = tuple(Device(kind="dry", index=d.index, name=run.product, total_bytes=d.total_bytes) for d in run.devices)
    measurements = tuple(
        _measurement(figures, device, run) for figures, device in zip(run.devices, devices, strict=True)
    )
    worst, budget, verdict = run.worst, None, None
    if worst is not None:
        budget = Budget(limit_bytes=worst.total_bytes, metric="device", origin="card", where=run.product)
        spare = worst.total_bytes - worst.peak_device_bytes
        verdict = Within(headroom_bytes=spare) if spare >= 0 else Exceeded(over_bytes=-spare)
    sound = run.exit_code == 0 and run.fits is not False
    test = TestRecord(
        nodeid=shlex.join(command),
        outcome="passed" if sound else "failed",
        budget=budget,
        measurements=measurements,
        verdict=verdict,
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
    return Report(environment=environment, tests=(test,))


def _measurement(figures: DeviceFigures, device: Device, run: RunReport) -> Measurement:
    recorded = run.recorded.get(figures.index, {})
    return Measurement(
        device=device,
        peak=Peak(
            allocated_bytes=figures.peak_allocated_bytes,
            reserved_bytes=figures.peak_reserved_bytes,
            device_bytes=figures.peak_device_bytes,
        ),
        holders=tuple(Holder(**holder) for holder in recorded.get("holders", ())),
        timeline=_timeline(recorded["timeline"]) if recorded else None,
        retries=figures.num_alloc_retries,
        ooms=figures.num_ooms,
        host_reads=run.host_reads if figures.index == run.devices[0].index else (),
    )


def _timeline(data: Mapping[str, Any]) -> Timeline:
    """From the JSON that a process left."""
    return Timeline(
        times=tuple(data["times"]),
        allocated=tuple(data["allocated"]),
        reserved=tuple(data["reserved"]),
        categories=_series(data["categories"]),
        modules=_series(data["modules"]),
        peak_index=data["peak_index"],
        events=data["events"],
        cut=data["cut"],
    )


def _series(parts: Sequence[Mapping[str, Any]]) -> tuple[Series, ...]:
    return tuple(Series(name=part["name"], sizes=tuple(part["sizes"])) for part in parts)
