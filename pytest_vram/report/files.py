"""Write reports to files and read them. The suffix of a file determines its format."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_vram.errors import VramUsageError
from pytest_vram.memory.codec import encode
from pytest_vram.report import code_quality, markdown, sarif
from pytest_vram.report.disk import load, write_atomically
from pytest_vram.report.rows import RankRow, Row, rows
from pytest_vram.report.tables import TABLES

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    import pandas

    from pytest_vram.memory import Report

__all__ = ["SCHEMA_FILE", "load", "load_report", "save", "suffix_of", "to_html"]

SCHEMA_FILE = Path(__file__).with_name("schema.json")
_NESTED = ("fixtures", "phases", "holders", "host_reads", "notes", "ranks", "work", "host")

_WORK = ("launches", "synchronizations", "copied_to_device_bytes", "copied_to_host_bytes")


def save(report: Report, path: str | os.PathLike[str], before: Report | None = None) -> None:
    """Write a report to a file atomically; an existing file is replaced.

    Args:
        report: the report to write.
        path: the file; its suffix determines the format.
        before: an earlier report; an HTML page shows the growth since then, by category and line of code.

    Raises:
        VramUsageError: if there is no format for the suffix.
        OSError: if the file cannot be written.
    """
    target = Path(path)
    suffix = suffix_of(target)
    text = to_html(report, before) if suffix == ".html" else _FORMATS[suffix](report)
    write_atomically(target, text)


def suffix_of(path: Path) -> str:
    """Return the suffix that determines the format of a file: ``.codequality.json`` differs from ``.json``.

    Raises:
        VramUsageError: if there is no format for the suffix.
    """
    for suffix in sorted(_FORMATS, key=len, reverse=True):
        if path.name.endswith(suffix):
            return suffix
    raise VramUsageError(f"{path}: the suffix says the format; choose {', '.join(_FORMATS)}")


def load_report(path: str | os.PathLike[str], table: str = "tests") -> pandas.DataFrame:
    """Return a ``.json`` report as a table; sizes are in bytes.

    Args:
        path: a file that ``--vram-output`` wrote.
        table: the table to return. The rows are

            * ``tests``: the tests, indexed by node id;
            * ``timeline``: the recorded moments of each test, with one column for each category;
            * ``holders``: the lines of code that held memory at the peak of each test;
            * ``segments``: the allocator's segments at the peak of each test;
            * ``ranks``: the processes below each test, the one with the largest peak first.

    Raises:
        VramUsageError: if the report cannot be read (see :func:`load`), or there is no such table.
        ImportError: if pandas is missing: ``pip install 'pytest-vram[report]'``.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("load_report needs pandas: pip install 'pytest-vram[report]'") from error
    report = load(path)
    if table == "tests":
        return pandas.DataFrame(_flat(report), columns=_columns()).set_index("nodeid")
    if table == "ranks":
        ranks = [{"nodeid": row.nodeid, **asdict(rank)} for row in rows(report) for rank in row.ranks]
        return pandas.DataFrame(ranks, columns=["nodeid", *(field.name for field in fields(RankRow))])
    if table not in TABLES:
        raise VramUsageError(f"table={table!r}: choose tests, {', '.join(TABLES)}, ranks")
    lines = [
        {"nodeid": test.nodeid, "device": measurement.device.index, **line}
        for test in report.tests
        for measurement in test.measurements
        for line in TABLES[table](measurement)
    ]
    return pandas.DataFrame(lines)


def to_json(report: Report) -> str:
    """Return the report as JSON text in the format that ``schema.json`` describes."""
    head = {"schema_version": report.schema_version}
    return json.dumps({**head, **encode(report)}, indent=1, ensure_ascii=False) + "\n"


def to_csv(report: Report) -> str:
    """Return the report as CSV: one line per test, sizes in bytes, and an empty cell for a missing figure."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _columns(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_flat(report))
    return out.getvalue()


def to_html(report: Report, before: Report | None = None) -> str:
    """Return the report as the HTML page of :mod:`pytest_vram.report.html`."""
    from pytest_vram.report.html import render

    return render(report, before)


_FORMATS: dict[str, Callable[[Report], str]] = {
    ".json": to_json,
    ".md": markdown.render,
    ".csv": to_csv,
    ".html": to_html,
    ".sarif": sarif.render,
    ".codequality.json": code_quality.render,
}


def _columns() -> list[str]:
    return [*(field.name for field in fields(Row) if field.name not in _NESTED), *_WORK]


def _flat(report: Report) -> list[dict[str, Any]]:
    plain = [name for name in _columns() if name not in _WORK]
    return [
        {name: getattr(row, name) for name in plain} | {name: getattr(row.work, name, None) for name in _WORK}
        for row in rows(report)
    ]
