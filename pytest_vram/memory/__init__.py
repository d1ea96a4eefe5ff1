"""What a measurement is: frozen dataclasses, standard library only."""

from pytest_vram.memory.budget import Budget, Metric, Scope
from pytest_vram.memory.device import Device, Environment, Kind
from pytest_vram.memory.layout import Layout, Run, Segment
from pytest_vram.memory.measurement import FixtureShare, Holder, HostRead, Measurement, Peak, Phase, Work
from pytest_vram.memory.report import Baseline, Report, TestRecord
from pytest_vram.memory.timeline import Series, Timeline
from pytest_vram.memory.verdict import Exceeded, Unmeasured, Verdict, Within

__all__ = [
    "Baseline",
    "Budget",
    "Device",
    "Environment",
    "Exceeded",
    "FixtureShare",
    "Holder",
    "HostRead",
    "Kind",
    "Layout",
    "Measurement",
    "Metric",
    "Peak",
    "Phase",
    "Report",
    "Run",
    "Scope",
    "Segment",
    "Series",
    "TestRecord",
    "Timeline",
    "Unmeasured",
    "Verdict",
    "Within",
    "Work",
]
