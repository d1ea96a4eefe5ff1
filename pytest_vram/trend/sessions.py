"""The files of a history: one for each session, in JSON lines, with the commit and the peak of each test.

A session adds a file with a name of its own and changes no other file. So two sessions can write at once, and branches
that carry their history with them merge without a conflict.
"""

from __future__ import annotations

import datetime
import json
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_vram import baseline
from pytest_vram.errors import VramUsageError
from pytest_vram.memory.codec import encode
from pytest_vram.report import disk
from pytest_vram.report.rows import rows

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_vram.memory import Measurement, Report, TestRecord
    from pytest_vram.report.rows import Row
    from pytest_vram.trend.repository import Head

VERSION = 1
_LINES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A category or a line of code, and the bytes that it held at the peak."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The allocated peak of one test on one card.

    Attributes:
        nodeid: the test.
        card: the card and the kind of probe, as in a baseline.
        peak_bytes: the peak.
        complete: whether the test reached its peak. A test that failed for another reason than its memory may have
            ended before.
        categories: the bytes of each category at the peak, if they were recorded.
        lines: the lines of code that held the most, if they were recorded.
    """

    nodeid: str
    card: str
    peak_bytes: int
    complete: bool = True
    categories: tuple[Size, ...] = ()
    lines: tuple[Size, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One session: when it ran, at which commit, and what it measured.

    Attributes:
        at: when the session began, in ISO format and UTC.
        commit: the full hash; ``None`` without git or in a repository without a commit.
        committed: when the commit was made, in ISO format.
        subject: the first line of the commit's message.
        branch: the branch; ``None`` if the head was detached.
        dirty: whether tracked files differed from the commit, so that the peaks are not those of the commit.
        folder: the path from the top of the repository to pytest's root folder.
        torch: the version of torch.
        pytest_vram: the version of this package.
        entries: the peaks.
    """

    at: str
    commit: str | None = None
    committed: str | None = None
    subject: str = ""
    branch: str | None = None
    dirty: bool = False
    folder: str = ""
    torch: str | None = None
    pytest_vram: str = ""
    entries: tuple[Entry, ...] = ()


def now() -> str:
    """Return the time in ISO format and UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def session(report: Report, head: Head, at: str) -> Session:
    """Return the session of a report.

    Args:
        report: what was measured.
        head: the commit, as it was when the session began.
        at: when the session began, as :func:`now` returned it.
    """
    shown = {row.nodeid: row for row in rows(report)}
    return Session(
        at=at,
        commit=head.commit,
        committed=head.committed,
        subject=head.subject,
        branch=head.branch,
        dirty=head.dirty,
        folder=head.folder,
        torch=report.environment.torch,
        pytest_vram=report.environment.pytest_vram,
        entries=tuple(entry for test in report.tests for entry in _entries(test, shown[test.nodeid])),
    )


def write(folder: Path, session: Session) -> Path:
    """Add a session to a history, and return the new file.

    Raises:
        OSError: if the file cannot be written.
    """
    moment = session.at.partition(".")[0].replace(":", "").replace("-", "")
    path = folder / f"{moment}-{(session.commit or 'no-commit')[:12]}-{uuid.uuid4().hex[:8]}.jsonl"
    top = {"vram_history": VERSION, **encode(session)}
    lines = [top | {"entries": []}, *top["entries"]] if "entries" in top else [top]
    text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    disk.write_atomically(path, text)
    return path


def read(folder: Path) -> list[Session]:
    """Return the sessions of a history in the order in which they began.

    Raises:
        VramUsageError: if the folder is not there or has no session, or a file cannot be read.
    """
    if not folder.is_dir():
        raise VramUsageError(f"history {folder} is not there: `pytest --vram-history={folder}` begins one")
    found = [_read(path) for path in sorted(folder.glob("*.jsonl")) if not path.name.startswith(".")]
    if not found:
        raise VramUsageError(f"history {folder} has no session: `pytest --vram-history={folder}` adds one")
    return sorted(found, key=lambda session: session.at)


def _read(path: Path) -> Session:
    what = f"history {path}"
    top, *entries = disk.parsed(path, what, _json_lines)
    data = {**top, "entries": entries} if isinstance(top, dict) else top
    return disk.decoded(Session, data, what, key="vram_history", version=VERSION, option="--vram-history")


def _json_lines(text: str) -> list[Any]:
    # A subject may hold separators such as U+2028, at which splitlines() would end a line too.
    lines = [json.loads(line) for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError("it has no line")
    return lines


def _entries(test: TestRecord, row: Row) -> list[Entry]:
    peaks = baseline.peaks_of(test)
    measured = {baseline.card_key(m.device): m for m in test.measurements}
    return [
        Entry(
            nodeid=test.nodeid,
            card=card,
            peak_bytes=peak,
            complete=_complete(test, row),
            categories=_categories(measured.get(card)),
            lines=_lines(measured.get(card)),
        )
        for card, peak in peaks.items()
    ]


def _complete(test: TestRecord, row: Row) -> bool:
    allowed = test.budget.max_leak_bytes if test.budget else None
    leaked = allowed is not None and row.leaked_bytes is not None and row.leaked_bytes > allowed
    host = test.host is not None and test.host.over_bytes > 0
    return test.outcome == "passed" or row.verdict == "exceeded" or row.regressed or leaked or host


def _categories(measurement: Measurement | None) -> tuple[Size, ...]:
    parts: dict[Any, int] = measurement.timeline.at_peak() if measurement and measurement.timeline else {}
    return tuple(Size(name=name, size_bytes=size) for name, size in parts.items())


def _lines(measurement: Measurement | None) -> tuple[Size, ...]:
    sums: dict[str, int] = {}
    for holder in measurement.holders if measurement else ():
        sums[holder.location] = sums.get(holder.location, 0) + holder.size_bytes
    largest = sorted(sums.items(), key=lambda item: -item[1])[:_LINES]
    return tuple(Size(name=name, size_bytes=size) for name, size in largest)
