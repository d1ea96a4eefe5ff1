"""Reads rows from local JSON lines, JSON, CSV and Parquet files, hub data sets, and the embedded data.

Rows are read one at a time, so that a file may be larger than memory (a JSON list excepted). Each row carries the place
that it came from, so that an error can name it.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.settings import EMBEDDED_DATA
from finetune.data.docstrings import docstring_fingerprint, docstring_rows
from finetune.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SHOWN_CHARACTERS = 80
_SAMPLE_BYTES = 1 << 20
_CSV_FIELD_BYTES = 1 << 27


class BadRowError(ValueError):
    """A row cannot be used; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row as it is stored."""

    source: str
    """Where the row is: ``file:line``, or ``file:row N`` in a JSON list, Parquet or hub data set, counted from 1."""
    fields: Any
    """The content of the row: a mapping of column to value, if the row is sound."""
    problem: str | None = None
    """Why the row could not be read; None if it could."""

    def beginning(self) -> str:
        """Return the first characters of the row on one line, for messages. A lone surrogate is shown as its escape."""
        text = self.fields if isinstance(self.fields, str) else json.dumps(self.fields, ensure_ascii=False, default=str)
        text = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
        return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def read_rows(data: str) -> Iterator[Row]:
    """Yield every row of a source, in order.

    Args:
        data: a .jsonl, .json, .csv or .parquet file, the name of a hub data set, or ``docstrings``.

    Raises:
        DataError: there is no such file or data set, the file is damaged, or it is not text in UTF-8.
    """
    if data == EMBEDDED_DATA:
        return (Row(source=f"{EMBEDDED_DATA}:{place}", fields=fields) for place, fields in docstring_rows())
    path = Path(data)
    if path.is_file():
        readers = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
        if path.suffix not in readers:
            raise DataError(
                f"data = {data!r}: files ending in {path.suffix!r} are not read; use one of {', '.join(SUFFIXES)}"
            )
        return _in_utf8(data, readers[path.suffix](path))
    if path.suffix in SUFFIXES or path.is_absolute() or data.startswith("."):
        raise DataError(f"data = {data!r}: there is no such file{_near(path)}")
    return _hub(data)


def source_fingerprint(data: str) -> str | None:
    """Return a digest that changes with a local source: of its path, size, time of change, first and last MiB.

    That of the embedded data changes with this Python.

    Returns:
        The digest; None for a hub data set, whose changes can be seen only by reading it.
    """
    if data == EMBEDDED_DATA:
        return docstring_fingerprint()
    digest = hashlib.sha256(data.encode())
    path = Path(data)
    if not path.is_file():
        return None
    facts = path.stat()
    digest.update(f"{path.resolve()}:{facts.st_size}:{facts.st_mtime_ns}".encode())
    with path.open("rb") as stream:
        digest.update(stream.read(_SAMPLE_BYTES))
        stream.seek(max(0, facts.st_size - _SAMPLE_BYTES))
        digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _in_utf8(data: str, rows: Iterator[Row]) -> Iterator[Row]:
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise DataError(
            f"data = {data!r}: byte {error.start} of what was read is not UTF-8 ({error.reason}); convert the file, "
            "for example with iconv -t UTF-8"
        ) from None


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parsed(line, f"{path}:{number}")


def _parsed(text: str, source: str) -> Row:
    try:
        return Row(source=source, fields=json.loads(text))
    except (ValueError, RecursionError) as error:
        return Row(source=source, fields=text, problem=f"not JSON: {error}")


def _json(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON file: one list, which is read whole, or JSON lines."""
    with path.open(encoding="utf-8-sig") as stream:
        if next((c for c in iter(lambda: stream.read(1), "") if not c.isspace()), "") != "[":
            yield from _json_lines(path)
            return
        stream.seek(0)
        try:
            items = json.load(stream)
        except (ValueError, RecursionError) as error:
            raise DataError(f"data = '{path}': not a JSON list of rows: {error}") from None
    for number, item in enumerate(items, start=1):
        yield Row(source=f"{path}:row {number}", fields=item)


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_CSV_FIELD_BYTES)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream)
        header: list[str] | None = None
        line = 1
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(source=f"{path}:{line}", fields="", problem=f"not CSV: {error}")
            else:
                if values and header is None:
                    header = [name.strip() for name in values]
                elif values and header is not None:
                    fields, problem = _named(header, values)
                    yield Row(source=f"{path}:{line}", fields=fields, problem=problem)
            line = reader.line_num + 1


def _named(header: list[str], values: list[str]) -> tuple[dict[str, str], str | None]:
    """Return the values of a CSV row by column name, and the reason if the row cannot be read.

    A column without a name is ignored if it holds nothing or a number: it is the index that pandas writes, or the empty
    column that a comma at the end of each line makes. Two columns may share a name if one is empty or both hold the
    same value.
    """
    fields: dict[str, str] = {}
    if len(values) < len(header) and any(header[len(values) :]):
        return dict(zip(header, values, strict=False)), _wrong_count(header, values)
    for number, value in enumerate(values, start=1):
        name = header[number - 1] if number <= len(header) else ""
        if name and fields.get(name) and value and fields[name] != value:
            return fields, (
                f"the header names two columns {name!r}, and they hold different values; rename one of them"
            )
        if name:
            fields[name] = fields.get(name) or value
        elif value.strip() and number > len(header):
            return fields | {f"(column {number})": value}, _wrong_count(header, values)
        elif value.strip() and not _is_number(value):
            shown = value if len(value) <= SHOWN_CHARACTERS else value[:SHOWN_CHARACTERS] + "..."
            return fields, (
                f"column {number} has no name in the header and holds {shown!r}, which is not a number; name the "
                "column, or remove it"
            )
    return fields, None


def _wrong_count(header: list[str], values: list[str]) -> str:
    return f"it has {len(values)} {'column' if len(values) == 1 else 'columns'}, and the header has {len(header)}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]  # pyarrow has no annotations
    import pyarrow.parquet  # type: ignore[import-untyped]  # pyarrow has no annotations

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            for fields in batch.to_pylist():
                number += 1
                yield Row(source=f"{path}:row {number}", fields=fields)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"data = '{path}': not a sound Parquet file (after row {number}): {error}") from None


def _hub(name: str) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # of many types: not found, offline, no train split, scripts refused
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"data = {name!r}: no file of that name, and no data set with a 'train' split could be loaded from the "
            f"hub: {reason[0]}. Give a {', '.join(SUFFIXES)} file, or 'docstrings' for the embedded one"
        ) from error
    for number, fields in enumerate(rows, start=1):
        yield Row(source=f"{name}:row {number}", fields=fields)


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f", nor a folder {path.parent}"
    names = [other.name for other in path.parent.iterdir() if other.suffix in SUFFIXES]
    near = difflib.get_close_matches(path.name, names, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
