"""Read a report from a file, write text to a file atomically, and find the repository around a folder."""

from __future__ import annotations

import json
import os
from errno import EISDIR
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any, TypeVar

from pytest_vram.errors import VramUsageError
from pytest_vram.memory import Report
from pytest_vram.memory.codec import decode
from pytest_vram.memory.report import SCHEMA_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def load(path: str | os.PathLike[str]) -> Report:
    """Read a ``.json`` report.

    Raises:
        VramUsageError: if the file does not exist, is not a report, or has another schema version.
    """
    source = Path(path)
    what = f"report {source}"
    data = parsed(source, what, json.loads)
    return decoded(Report, data, what, key="schema_version", version=SCHEMA_VERSION, option="--vram-output")


def parsed(path: Path, what: str, parse: Callable[[str], Any]) -> Any:
    """Return what ``parse`` makes of a file's text.

    Args:
        path: the file.
        what: what the file is, for the message, such as ``report build/vram.json``.
        parse: raises ValueError for text that it cannot read.

    Raises:
        VramUsageError: if the file is not there or cannot be read.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise VramUsageError(f"{what} is not there") from error
    except (OSError, ValueError) as error:  # bad JSON and bad UTF-8 are ValueErrors
        raise VramUsageError(f"{what} cannot be read: {error}. Is it the right file, and complete?") from error


def decoded(cls: type[T], data: Any, what: str, *, key: str, version: int, option: str) -> T:
    """Return plain JSON values as an object of ``cls``.

    Args:
        cls: a dataclass.
        data: the values, with the version of their format under ``key``.
        what: what the values are, for the message.
        key: the name of the version.
        version: the version that is read.
        option: the option of pytest that writes such files, for the message.

    Raises:
        VramUsageError: if the values have another version, or do not fit ``cls``.
    """
    found = data.get(key) if isinstance(data, dict) else None
    if found != version:
        raise VramUsageError(
            f"{what} is of version {found!r}, and this pytest-vram reads {version}: is it a file that {option} wrote,"
            " by this version?"
        )
    try:
        return decode(cls, data)
    except VramUsageError as error:
        raise VramUsageError(f"{what}: {error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def refuse_unwritable(path: Path, option: str) -> None:
    """Make the folder of a file that is written at the end, so that a wrong name is found before the run.

    Args:
        path: the file, which is not touched.
        option: what named it, for the message, such as ``--html``.

    Raises:
        VramUsageError: if no file can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(EISDIR, "it is a folder")
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise VramUsageError(f"{option} {path} cannot be written: {error.strerror}; name another place") from error


def repository(folder: Path) -> Path:
    """Return the innermost folder with a ``.git`` entry around ``folder``, or ``folder`` itself."""
    folder = folder.resolve()
    return next((above for above in (folder, *folder.parents) if (above / ".git").exists()), folder)
