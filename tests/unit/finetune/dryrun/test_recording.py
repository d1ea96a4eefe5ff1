"""What a recorded step says of its peak."""

from __future__ import annotations

from finetune.dryrun.recording import by_category
from pytest_vram.memory import Series, Timeline
from pytest_vram.memory.timeline import CATEGORIES

TIMELINE = Timeline(
    times=(0.0, 1.0, 2.0),
    allocated=(1, 9, 2),
    categories=(Series(name="weights", sizes=(1, 2, 2)), Series(name="logits", sizes=(0, 7, 0))),
    peak_index=1,
)


def test_every_category_is_there_and_they_come_to_the_peak() -> None:
    found = by_category(TIMELINE, 9)
    assert tuple(found) == CATEGORIES
    assert {name: size for name, size in found.items() if size} == {"weights": 2, "logits": 7}


def test_what_the_record_has_lost_is_other() -> None:
    assert by_category(TIMELINE, 12)["other"] == 3
