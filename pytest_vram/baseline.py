"""Baselines: a JSON file with the peak of each test, and the changes of a report against it.

The file has one sorted line for each test, so a diff of two versions lists the tests whose peak changed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_vram.errors import VramUsageError
from pytest_vram.memory import Baseline
from pytest_vram.memory.process import cards_of
from pytest_vram.memory.report import NOISE_BYTES, grew
from pytest_vram.report import disk
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pytest_vram.memory import Device, Report, TestRecord

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The allocated peak of one test on one card, before and after, in bytes."""

    nodeid: str
    card: str
    before_bytes: int
    after_bytes: int
    tolerance_percent: float

    @property
    def percent(self) -> float:
        """Return the growth of the peak in percent; it is negative if the peak shrank."""
        if self.before_bytes == 0:
            return 0.0 if self.after_bytes == 0 else float("inf")
        return (self.after_bytes - self.before_bytes) / self.before_bytes * 100

    @property
    def percent_text(self) -> str:
        """Return the growth such as ``+11.1%``, or ``was 0 B``, of which no percentage can be taken."""
        return f"{self.percent:+.1f}%" if self.before_bytes else "was 0 B"

    @property
    def regressed(self) -> bool:
        """Whether the peak grew by more than the tolerance."""
        return grew(self.before_bytes, self.after_bytes, self.tolerance_percent)

    @property
    def improved(self) -> bool:
        """Whether the peak shrank by more than the tolerance."""
        return self.after_bytes < self.before_bytes * (1 - self.tolerance_percent / 100) - NOISE_BYTES

    def message(self, baseline: Path) -> str:
        """Return the change as a sentence; ``baseline`` is the file that it names after a regression."""
        verb = "grew" if self.after_bytes > self.before_bytes else "shrank"
        text = (
            f"{self.nodeid} {verb} from {format_bytes(self.before_bytes)} to {format_bytes(self.after_bytes)} "
            f"({self.percent_text}) on {self.card}"
        )
        if self.regressed:
            text += (
                f"; the limit is {self.tolerance_percent:g}% over {baseline}. If the growth is meant, run again with "
                "--vram-update-baseline and commit the file"
            )
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """The differences between a report and a baseline."""

    regressed: tuple[Change, ...]
    improved: tuple[Change, ...]
    missing: tuple[str, ...]
    """Node ids of measured tests that have no entry in the baseline."""


Peaks = dict[str, dict[str, int]]
"""Node id -> card -> allocated peak in bytes."""


def card_key(device: Device) -> str:
    """Return the key of a device's peaks. Peaks of different cards or kinds of probe are never compared."""
    return f"{device.name} ({device.kind})"


def read(path: Path) -> Peaks:
    """Read a baseline file.

    Raises:
        VramUsageError: the file does not exist, or is not a baseline; the message says which.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise VramUsageError(f"baseline {path} is not there: --vram-update-baseline writes it") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise VramUsageError(f"baseline {path} cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("peaks"), dict):
        found = data.get("version") if isinstance(data, dict) else None
        raise VramUsageError(
            f"baseline {path} is of version {found!r}, not {VERSION}: write it anew with --vram-update-baseline"
        )
    for nodeid, cards in data["peaks"].items():
        if not isinstance(cards, dict) or not all(_is_size(size) for size in cards.values()):
            raise VramUsageError(f"baseline {path}: the entry of {nodeid!r} is not an object of peaks in bytes")
    peaks: Peaks = data["peaks"]
    return peaks


def peaks(report: Report, *, failed: bool = False) -> Peaks:
    """Return the peaks of the tests of a report that passed; with ``failed``, also of those that failed.

    A failed test may have ended before its peak, and many tests need no memory of a card at all. So a new baseline
    leaves both out, while a comparison of two reports includes them.
    """
    found: Peaks = {}
    for test in report.tests:
        if failed or test.outcome == "passed":
            for card, peak in peaks_of(test, idle=failed).items():
                found.setdefault(test.nodeid, {})[card] = peak
    return found


def only_in(one: Peaks, other: Peaks) -> list[str]:
    """Return the tests that need memory in ``one`` and were not measured in ``other``, in the order of their names."""
    return sorted(nodeid for nodeid in one.keys() - other.keys() if any(one[nodeid].values()))


def compare_record(record: TestRecord, baseline: Mapping[str, Mapping[str, int]], tolerance: float) -> list[Change]:
    """Return the changes of one test, one for each card on which the baseline has a peak of it."""
    known = baseline.get(record.nodeid, {})
    return [
        Change(nodeid=record.nodeid, card=card, before_bytes=known[card], after_bytes=peak, tolerance_percent=tolerance)
        for card, peak in peaks_of(record, idle=True).items()
        if card in known
    ]


def compare(report: Report, baseline: Mapping[str, Mapping[str, int]], tolerance: float) -> Changes:
    """Compare a report with a baseline.

    Args:
        report: what was measured now.
        baseline: from :func:`read` or :func:`peaks`.
        tolerance: a change of at most this many percent is neither a regression nor an improvement.
    """
    changes = [change for test in report.tests for change in compare_record(test, baseline, tolerance)]
    missing = [t.nodeid for t in report.tests if peaks_of(t).keys() - baseline.get(t.nodeid, {}).keys()]
    return Changes(
        regressed=tuple(sorted((c for c in changes if c.regressed), key=lambda c: -c.percent)),
        improved=tuple(sorted((c for c in changes if c.improved), key=lambda c: c.percent)),
        missing=tuple(missing),
    )


def held_against(report: Report, peaks: Mapping[str, Mapping[str, int]], *, source: str, tolerance: float) -> Report:
    """Return the report with each measurement's earlier peak in ``baseline_bytes``.

    Args:
        report: what was measured now.
        peaks: from :func:`read` or :func:`peaks`.
        source: the name of the file that the peaks come from.
        tolerance: growth of at most this many percent is not a regression.
    """
    tests = []
    for test in report.tests:
        known = peaks.get(test.nodeid, {})
        measurements = tuple(replace(m, baseline_bytes=known.get(card_key(m.device))) for m in test.measurements)
        tests.append(replace(test, measurements=measurements))
    return replace(report, tests=tuple(tests), baseline=Baseline(source=source, tolerance_percent=tolerance))


def read_any(path: Path) -> tuple[Peaks, Report | None]:
    """Read peaks from a baseline file or from a ``.json`` report.

    Returns:
        The peaks, and the report; the report is ``None`` for a baseline file.

    Raises:
        VramUsageError: the file is neither of the two.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        data = None  # `read` says what is wrong
    if not isinstance(data, dict) or "schema_version" not in data:
        return read(path), None
    report = disk.load(path)
    return peaks(report, failed=True), report


def update(path: Path, report: Report) -> int:
    """Write the peaks of the tests that passed, and leave every other entry as it is.

    Returns:
        The number of peaks that were written.

    Raises:
        VramUsageError: ``path`` exists and is not a baseline; it is not overwritten.
        OSError: the file cannot be written; the old one stays as it is.
    """
    merged = read(path) if path.exists() else {}
    new = peaks(report)
    for nodeid, cards in new.items():
        merged[nodeid] = {**merged.get(nodeid, {}), **cards}
    disk.write_atomically(path, dump(merged))
    return sum(len(cards) for cards in new.values())


def dump(peaks: Mapping[str, Mapping[str, int]]) -> str:
    """Return the text of a baseline file: one sorted line for each test."""
    lines = [
        f"    {json.dumps(nodeid)}: {json.dumps(dict(sorted(peaks[nodeid].items())), ensure_ascii=False)}"
        for nodeid in sorted(peaks)
    ]
    body = ",\n".join(lines)
    return f'{{\n  "version": {VERSION},\n  "peaks": {{\n{body}\n  }}\n}}\n'


def peaks_of(record: TestRecord, *, idle: bool = False) -> dict[str, int]:
    """Return a test's allocated peak on each card, in bytes: all processes together, and the largest of like cards.

    Args:
        record: the test.
        idle: include cards of which the test needed no memory, unless it was skipped.
    """
    found: dict[str, int] = {}
    idle = idle and record.outcome != "skipped"
    for card in cards_of(record.measurements, record.processes, "allocated"):
        if card.size_bytes or (idle and card.size_bytes is not None):
            key = card_key(card.worst.device)
            found[key] = max(found.get(key, 0), card.size_bytes)
    return found


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
