"""What a test's measurement says beside its figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_vram.drygpu.cards import IDLE_CONTEXT
from pytest_vram.memory import Budget, Device, Peak
from pytest_vram.plugin.meter import Meter
from pytest_vram.probe.base import PlainProbe
from pytest_vram.probe.intervals import Intervals

if TYPE_CHECKING:
    from pytest_vram.memory.budget import Metric
    from pytest_vram.memory.device import Kind


class OneCard(PlainProbe):
    """A probe of one card that holds nothing."""

    def __init__(self, kind: Kind, name: str) -> None:
        self.device = Device(kind=kind, index=0, name=name)

    def devices(self) -> tuple[Device, ...]:
        return (self.device,)

    def allocated(self) -> tuple[int, ...]:
        return (0,)

    def peak(self) -> tuple[Peak, ...]:
        return (Peak(allocated_bytes=0),)

    def reset_peak(self) -> None:
        """Its peak is always 0."""


@pytest.mark.parametrize(
    ("kind", "name", "metric", "texts"),
    [
        ("dry", "NVIDIA L4", "device", [IDLE_CONTEXT]),
        ("dry", "NVIDIA L4", "allocated", []),
        ("dry", "NVIDIA H200", "device", []),
        ("cuda", "NVIDIA L4", "device", []),
    ],
)
def test_a_budget_for_all_that_a_dry_card_holds_says_how_far_its_context_can_be_trusted(
    kind: Kind, name: str, metric: Metric, texts: list[str]
) -> None:
    probe = OneCard(kind, name)
    budget = Budget(limit_bytes=1, metric=metric, origin="marker")
    (measurement,) = Meter(probe, Intervals(probe), budget, (), 3).measurements()
    assert [note.text for note in measurement.notes] == texts
