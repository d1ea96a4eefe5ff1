"""Recognises data files that are not what their name says, by their first bytes, before a row of them is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

_READ_BYTES = 64
_ASCII = b"\t\r\n" + bytes(range(32, 127))
_PARQUET = b"PAR1"
_CONVERTED = "convert it, for example with iconv -f {} -t UTF-8 OLD > NEW"
_KINDS = (
    (b"version https://git-lfs", "a pointer of Git LFS and not the data; fetch the data with git lfs pull"),
    (b"\x1f\x8b", "compressed with gzip; unpack it, for example with gunzip"),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard; unpack it, for example with unzstd"),
    (b"\xfd7zXZ\0", "compressed with xz; unpack it, for example with unxz"),
    (b"BZh91AY&SY", "compressed with bzip2; unpack it, for example with bunzip2"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet; unpack it, or save the sheet as CSV"),
    (_PARQUET, "a Parquet file; let its name end in .parquet"),
    (b"ARROW1", "an Arrow file; save it as Parquet"),
    (b"\xff\xfe\0\0", f"text in UTF-32; {_CONVERTED.format('UTF-32')}"),
    (b"\0\0\xfe\xff", f"text in UTF-32; {_CONVERTED.format('UTF-32')}"),
    (b"\xff\xfe", f"text in UTF-16; {_CONVERTED.format('UTF-16')}"),
    (b"\xfe\xff", f"text in UTF-16; {_CONVERTED.format('UTF-16')}"),
    (b"<!doctype", "a web page; download the file that the page shows"),
    (b"<html", "a web page; download the file that the page shows"),
)


def what_it_is(path: Path) -> str | None:
    """Return what a file is and what to do about it, in words; None if it may hold rows of text."""
    with path.open("rb") as stream:
        beginning = stream.read(_READ_BYTES)
    for start, told in _KINDS:
        if beginning.lower().startswith(start.lower()):
            return told
    whole = beginning[: len(beginning) // 2 * 2]
    for endian, first in (("LE", 0), ("BE", 1)):
        letters, zeros = whole[first::2], whole[1 - first :: 2]
        if whole and not any(zeros) and all(letter in _ASCII for letter in letters):
            return f"text in UTF-16; {_CONVERTED.format(f'UTF-16{endian}')}"
    return "binary and not text" if beginning.startswith(b"\0") else None


def require_text(path: Path) -> None:
    """Refuse a file of JSON or CSV that holds something else.

    Raises:
        DataError: the first bytes are those of a compressed file, of text in another encoding, or the like.
    """
    if told := what_it_is(path):
        raise DataError(f"data = '{path}': the file is {told}")


def require_parquet(path: Path) -> None:
    """Refuse a file that does not begin as Parquet files do.

    Raises:
        DataError: the file begins with other bytes.
    """
    with path.open("rb") as stream:
        beginning = stream.read(len(_PARQUET))
    if beginning != _PARQUET:
        told = what_it_is(path) or ("no Parquet file, whatever its name says" if beginning else "empty")
        raise DataError(f"data = '{path}': the file is {told}")


def first_byte_that_is_not_utf8(path: Path) -> tuple[int, int] | None:
    """Return the line and the column in bytes, both counted from 1, of the first byte that UTF-8 does not allow."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return number, error.start + 1
    return None
