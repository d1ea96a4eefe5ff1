"""The data types of a measurement: frozen dataclasses that need only the standard library."""

from pytest_vram.memory.budget import Budget, Metric, Ranks, Scope
from pytest_vram.memory.device import Device, Environment, Kind
from pytest_vram.memory.host_peak import HostPeak
from pytest_vram.memory.layout import Layout, Run, Segment
from pytest_vram.memory.measurement import FixtureShare, Holder, HostRead, Measurement, Phase
from pytest_vram.memory.note import Note, merged, note_lines, without_size
from pytest_vram.memory.peak import Peak
from pytest_vram.memory.process import Process
from pytest_vram.memory.process_peak import ProcessPeak
from pytest_vram.memory.report import Baseline, Report, TestRecord
from pytest_vram.memory.spread import Spread, spread_of
from pytest_vram.memory.timeline import Series, Timeline
from pytest_vram.memory.verdict import Exceeded, Unmeasured, Verdict, Within
from pytest_vram.memory.work import Work

__all__ = [
    "Baseline",
    "Budget",
    "Device",
    "Environment",
    "Exceeded",
    "FixtureShare",
    "Holder",
    "HostPeak",
    "HostRead",
    "Kind",
    "Layout",
    "Measurement",
    "Metric",
    "Note",
    "Peak",
    "Phase",
    "Process",
    "ProcessPeak",
    "Ranks",
    "Report",
    "Run",
    "Scope",
    "Segment",
    "Series",
    "Spread",
    "TestRecord",
    "Timeline",
    "Unmeasured",
    "Verdict",
    "Within",
    "Work",
    "merged",
    "note_lines",
    "spread_of",
    "without_size",
]
