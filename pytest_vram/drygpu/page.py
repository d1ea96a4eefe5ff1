"""A dry run as a report, so that it is drawn as a session of tests is: one row a command, the card as its budget."""

from __future__ import annotations

import platform
import shlex
from typing import TYPE_CHECKING

from pytest_vram.memory import (
    Budget,
    Device,
    Environment,
    Exceeded,
    Holder,
    Measurement,
    Peak,
    Report,
    TestRecord,
    Timeline,
    Verdict,
    Within,
)
from pytest_vram.memory.codec import decode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_vram.drygpu.summary import DeviceFigures, RunReport


def as_report(run: RunReport, command: Sequence[str]) -> Report:
    """The run as the only test of a report; its budget is the card, context included."""
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
    sound = run.exit_code == 0 and run.fits is not False
    return held_against_card(shlex.join(command), measurements, environment, sound=sound)


def held_against_card(
    name: str, measurements: Sequence[Measurement], environment: Environment, *, sound: bool
) -> Report:
    """A report with one test, whose budget is the memory of the card that held most, context included.

    Args:
        name: what the test is called: a command line.
        measurements: one a device.
        environment: what was measured with.
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
    recorded = run.recorded.get(figures.index, {})
    return Measurement(
        device=device,
        peak=Peak(
            allocated_bytes=figures.peak_allocated_bytes,
            reserved_bytes=figures.peak_reserved_bytes,
            device_bytes=figures.peak_device_bytes,
        ),
        holders=tuple(decode(Holder, holder) for holder in recorded.get("holders", ())),
        timeline=decode(Timeline, recorded["timeline"]) if recorded else None,
        retries=figures.num_alloc_retries,
        ooms=figures.num_ooms,
        work=figures.work,
        host_reads=run.host_reads if figures.index == run.devices[0].index else (),
    )
