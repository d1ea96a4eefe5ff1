"""Sessions are written and read back whole, and say which peaks were reached."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_vram.errors import VramUsageError
from pytest_vram.memory import Device, Environment, HostPeak, Measurement, Peak, Report, TestRecord
from pytest_vram.trend import sessions
from pytest_vram.trend.repository import Head
from pytest_vram.units import GIB

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\f", "\r", "\x1c"])
def test_a_subject_with_a_separator_is_read_back(tmp_path: Path, separator: str) -> None:
    kept = sessions.Session(
        at=sessions.now(),
        commit="a" * 40,
        subject=f"one{separator}two",
        entries=(sessions.Entry(nodeid=f"t[{separator}]", card="a card (dry)", peak_bytes=1),),
    )
    sessions.write(tmp_path, kept)
    assert sessions.read(tmp_path) == [kept]


def test_a_test_that_broke_its_budget_of_host_memory_went_as_far_as_its_peak() -> None:
    card = Device(kind="dry", index=0, name="a card")
    measured = (Measurement(device=card, peak=Peak(allocated_bytes=GIB)),)

    def complete(peak: int | None) -> bool:
        host = None if peak is None else HostPeak(limit_bytes=GIB, peak_bytes=peak)
        test = TestRecord(nodeid="t", outcome="failed", measurements=measured, host=host)
        report = Report(environment=Environment(python="3", pytest_vram="0", devices=(card,)), tests=(test,))
        (entry,) = sessions.session(report, Head(), sessions.now()).entries
        return entry.complete

    assert complete(3 * GIB) is True
    assert complete(GIB // 2) is complete(None) is False, "it failed for another reason, perhaps before its peak"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "cannot be read: it has no line"),
        ("[]\n", "is of version None"),
        ('{"vram_history": 1}\n', "Session has no"),
    ],
)
def test_a_broken_file_is_refused_by_its_name(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "broken.jsonl").write_text(text)
    with pytest.raises(VramUsageError, match=rf"broken\.jsonl.*{complaint}"):
        sessions.read(tmp_path)
