"""What a trial's figures rest on, and the bounds that follow."""

from __future__ import annotations

import pytest

from finetune.dryrun import assumptions
from finetune.dryrun.messages import Trial
from pytest_vram.drygpu import driver, notes
from pytest_vram.memory import Note
from pytest_vram.units import GIB

POOL = Note(name="cudaMallocAsync", text="a guess", source="driver")


def test_the_context_is_the_same_in_both_bounds() -> None:
    """The measured runs were off by 2% of what the allocator had reserved."""
    trial = Trial(
        fits=True,
        message="",
        phases={},
        categories={},
        peak_allocated=5 * GIB,
        peak_reserved=6 * GIB,
        peak_device=101 * GIB,
        context=GIB,
        total=200 * GIB,
        managed=0,
        seconds=1.0,
        device="a card",
        dry=True,
        notes=(POOL,),
    )
    found = assumptions.spread(trial)
    assert found is not None
    assert (found.low, found.expected, found.high) == (99 * GIB, 101 * GIB, 103 * GIB)


@pytest.mark.parametrize("dry", [True, False])
def test_only_a_dry_gpu_makes_assumptions(monkeypatch: pytest.MonkeyPatch, dry: bool) -> None:
    monkeypatch.setattr(driver, "is_active", lambda: dry)
    monkeypatch.setattr(notes, "so_far", lambda: (POOL,))
    assert assumptions.collect() == ((POOL,) if dry else ())
