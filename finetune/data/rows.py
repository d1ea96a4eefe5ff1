"""Reads rows from local JSON lines, JSON, CSV and Parquet files, hub data sets, and the embedded data.

Rows are read one at a time, so that a file may be larger than memory (a JSON list excepted). Each row carries the place
that it came from, so that an error can name it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.settings import EMBEDDED_DATA
from finetune.data.csv_rows import columns_of, read_csv
from finetune.data.docstrings import docstring_fingerprint, docstring_rows
from finetune.data.file_kind import first_byte_that_is_not_utf8, require_parquet, require_text, what_it_is
from finetune.data.formats import is_format, shown
from finetune.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_SAMPLE_BYTES = 1 << 20


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
        return shown(" ".join(text.split()).encode("utf-8", "backslashreplace").decode())


def read_rows(data: str) -> Iterator[Row]:
    """Yield every row of a source, in order.

    Args:
        data: a file that ends in one of `SUFFIXES`, the name of a hub data set, or ``docstrings``.

    Raises:
        DataError: there is no such file or data set, the file cannot be read, or it holds something other than rows.
    """
    if data == EMBEDDED_DATA:
        return (Row(source=f"{EMBEDDED_DATA}:{place}", fields=fields) for place, fields in docstring_rows())
    path = Path(data)
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix not in SUFFIXES:
            told = what_it_is(path)
            raise DataError(
                f"data = {data!r}: files ending in {path.suffix!r} are not read; use one of {', '.join(SUFFIXES)}"
                + (f". The file is {told}" if told else "")
            )
        readers = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
        return _sound(path, readers.get(suffix, _json)(path))
    if suffix in SUFFIXES and path.is_dir():
        raise DataError(f"data = {data!r}: this is a folder; give a file in it")
    if suffix in SUFFIXES or path.is_absolute() or data.startswith("."):
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


def _sound(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    try:
        yield from rows
    except UnicodeDecodeError as error:
        line, column = first_byte_that_is_not_utf8(path) or (0, 0)
        raise DataError(
            f"data = '{path}': byte {column} of line {line} is not UTF-8 ({error.reason}); convert the file from the "
            "encoding that it has, for example with iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
        ) from None
    except OSError as error:
        raise DataError(f"data = '{path}': the file cannot be read: {error.strerror or error}") from None


def _json(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON file: one on each line, or one list, which is read whole."""
    require_text(path)
    with path.open(encoding="utf-8-sig") as stream:
        first = next((line for line in stream if line.strip()), "")
        following = next((line for line in stream if line.strip()), "")
        try:
            value = json.loads(first)
        except (ValueError, RecursionError):
            value = None
            one_list = first.lstrip().startswith("[") and not _is_json(following)
            _require_a_row_on_a_line(path, first, following)
        else:
            one_list = isinstance(value, list) and not following
            if isinstance(value, dict) and not following:
                _require_a_row(path, value)
        if not one_list:
            yield from _json_lines(path)
            return
        stream.seek(0)
        try:
            items = json.load(stream)
        except (ValueError, RecursionError) as error:
            raise DataError(f"data = '{path}': not a JSON list of rows: {error}") from None
    for number, item in enumerate(items, start=1):
        yield Row(source=f"{path}:row {number}", fields=item)


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.strip("\ufeff \t\r\n")  # files that are joined with cat have the mark of UTF-8 in between
            if text:
                yield _parsed(text, f"{path}:{number}")


def _parsed(text: str, source: str) -> Row:
    try:
        return Row(source=source, fields=json.loads(text))
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" starting at")
        return Row(source=source, fields=text, problem=f"not JSON: {what} (column {error.colno} of the line)")
    except (ValueError, RecursionError) as error:
        return Row(source=source, fields=text, problem=f"not JSON: {error}")


def _is_json(text: str) -> bool:
    return _parsed(text, "").problem is None


def _require_a_row_on_a_line(path: Path, first: str, following: str) -> None:
    """Refuse a JSON file whose first lines are a part of an object each, and one whose first line is CSV."""
    if first.lstrip().startswith("{") and following and not following.lstrip().startswith(("{", "[")):
        raise DataError(
            f"data = '{path}': the file holds an object that covers several lines; write each row on one line, for "
            "example with jq -c . OLD > NEW (jq -c '.data[]' if the rows are in a list named data)"
        )
    if is_format(columns_of(first)):
        raise DataError(
            f"data = '{path}': the first line names columns, as that of a CSV file does; let its name end in .csv"
        )


def _require_a_row(path: Path, value: dict[str, Any]) -> None:
    """Refuse a file of one object that holds rows or columns and is no row itself."""
    lists = {name: held for name, held in value.items() if isinstance(held, list)}
    rows = [name for name, held in lists.items() if held and all(isinstance(item, dict) for item in held)]
    if rows and not is_format(value):
        raise DataError(
            f"data = '{path}': the file holds one object, with a list {rows[0]!r} in it; if that list has the rows, "
            f"write it alone, for example with jq -c '.{rows[0]}[]' OLD > NEW"
        )
    columns = [held for held in lists.values() if held and not any(isinstance(item, dict) for item in held)]
    if value and (all(isinstance(held, dict) for held in value.values()) or len(columns) == len(value)):
        raise DataError(
            f"data = '{path}': the file holds columns and not rows; write a row on each line, as pandas does with "
            "DataFrame.to_json(path, orient='records', lines=True)"
        )


def _csv(path: Path) -> Iterator[Row]:
    require_text(path)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        if (start := stream.read(1)) in ("{", "["):
            raise DataError(f"data = '{path}': the file begins with {start} as JSON does; let its name end in .jsonl")
        stream.seek(0)
        for line, fields, problem in read_csv(stream):
            yield Row(source=f"{path}:{line}", fields=fields, problem=problem)


def _parquet(path: Path) -> Iterator[Row]:
    require_parquet(path)
    import pyarrow  # type: ignore[import-untyped]  # pyarrow has no annotations
    import pyarrow.parquet  # type: ignore[import-untyped]  # pyarrow has no annotations

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            for fields in batch.to_pylist():
                number += 1
                yield Row(source=f"{path}:row {number}", fields=fields)
    # A damaged page is an OSError, damaged text a UnicodeDecodeError.
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
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
    names = [other.name for other in path.parent.iterdir() if other.suffix.lower() in SUFFIXES and other.is_file()]
    near = difflib.get_close_matches(path.name, names, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
