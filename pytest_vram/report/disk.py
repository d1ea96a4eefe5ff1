"""Read a report from a file, write text to a file atomically, and find the repository around a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pytest_vram.errors import VramUsageError
from pytest_vram.memory import Report
from pytest_vram.memory.codec import decode
from pytest_vram.memory.report import SCHEMA_VERSION


def load(path: str | os.PathLike[str]) -> Report:
    """Read a ``.json`` report.

    Raises:
        VramUsageError: if the file does not exist, is not a report, or has another schema version.
    """
    source = Path(path)
    try:
        data = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise VramUsageError(f"report {source} is not there") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise VramUsageError(f"report {source} cannot be read: {error}") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise VramUsageError(
            f"report {source} has schema version {version!r}, and this pytest-vram reads {SCHEMA_VERSION}: is it a"
            " file that --vram-output wrote, by this version?"
        )
    try:
        return decode(Report, data)
    except VramUsageError as error:
        raise VramUsageError(f"report {source}: {error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def repository(folder: Path) -> Path:
    """Return the innermost folder with a ``.git`` entry around ``folder``, or ``folder`` itself."""
    folder = folder.resolve()
    return next((above for above in (folder, *folder.parents) if (above / ".git").exists()), folder)
