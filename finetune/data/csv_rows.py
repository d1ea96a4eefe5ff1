"""Reads a CSV file: finds its delimiter, and names what is wrong with a row."""

from __future__ import annotations

import csv
import itertools
from typing import IO, TYPE_CHECKING

from finetune.data.formats import is_format, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DELIMITERS = (",", ";", "\t", "|")
_FIELD_BYTES = 1 << 27


def read_csv(stream: IO[str]) -> Iterator[tuple[int, dict[str, str] | str, str | None]]:
    """Yield the rows of a CSV file.

    Args:
        stream: the file, opened with ``newline=""``. Its first line names the columns. A line ``sep=;`` before it,
            as Excel writes it, gives the delimiter; otherwise `delimiter_of` finds it.

    Yields:
        The line on which the row begins, counted from 1; its values by column name, or its text if it cannot be cut
        into values; and why it cannot be read, or None.
    """
    csv.field_size_limit(_FIELD_BYTES)
    before, first = 0, ""
    for line in stream:
        if line.strip():
            first = line
            break
        before += 1
    given = first.rstrip("\r\n")
    if given.lower().startswith("sep=") and len(given) == len("sep=") + 1:
        before, first, delimiter = before + 1, stream.readline(), given[-1]
    else:
        delimiter = delimiter_of(first)
    # "prompt, completion": a file that writes a space after each delimiter of its header does so in its rows.
    spaced = f"{delimiter} " in first and all(name.startswith(" ") for name in first.split(delimiter)[1:])
    held: list[str] = []
    lines = _kept(itertools.chain([first], stream), held)
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=spaced, strict=True)
    header: list[str] | None = None
    line_number = before + 1
    while True:
        held.clear()
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            covered = _covered(line_number, before + reader.line_num)
            yield line_number, "".join(held), f"not CSV: {error}{covered}{_remedy(error)}"
        else:
            if values and header is None:
                header = [name.strip() for name in values]
            elif values and header is not None:
                fields, problem = _named(header, values)
                if problem is not None:
                    problem += _covered(line_number, before + reader.line_num)
                yield line_number, fields, problem
        line_number = before + reader.line_num + 1


def _kept(lines: Iterable[str], held: list[str]) -> Iterator[str]:
    """Yield the lines, and append each to ``held``, so that an error can show the text of a row."""
    for line in lines:
        held.append(line)
        yield line


def delimiter_of(header: str) -> str:
    """Return the delimiter of a CSV file, from its first line.

    It is the first of `DELIMITERS` that splits the line into the columns of a format. If none does, it is the one that
    splits the line into the most columns, so that an error can name them.
    """
    splits = {delimiter: _split(header, delimiter) for delimiter in DELIMITERS}
    known = [delimiter for delimiter, names in splits.items() if is_format(names)]
    return known[0] if known else max(DELIMITERS, key=lambda delimiter: len(splits[delimiter]))


def columns_of(header: str) -> list[str]:
    """Return the columns that the first line of a CSV file names."""
    return _split(header, delimiter_of(header))


def _split(header: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([header], delimiter=delimiter, skipinitialspace=True), [])]
    except csv.Error:
        return []


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
            return fields, (
                f"column {number} has no name in the header and holds {shown(value)!r}, which is not a number; name "
                "the column, or remove it"
            )
    return fields, None


def _wrong_count(header: list[str], values: list[str]) -> str:
    return (
        f"it has {len(values)} {'column' if len(values) == 1 else 'columns'}, and the header has {len(header)}; "
        "a text with a delimiter or a line break in it needs quotation marks around it"
    )


def _covered(first: int, last: int) -> str:
    """Return how far a row reaches. One quotation mark too few or too many makes a row of many lines."""
    return f" (the row covers lines {first} to {last})" if last > first else ""


def _remedy(error: csv.Error) -> str:
    if "field larger" in str(error):
        return f"; a field has at most {_FIELD_BYTES:,} characters"
    return "; inside quotation marks, write a quotation mark twice"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
