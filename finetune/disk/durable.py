"""Writes files that survive a power cut: under a temporary name first, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

from finetune.errors import OutputError, WriteError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_TEMPORARY, _TRASH = ".tmp-", ".trash-"


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``. After a crash the file has its old content or the new one, never a mixture."""
    aside = path.with_name(f"{_TEMPORARY}{path.name}")
    with saving(path):
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with :func:`write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Make a folder that appears at ``path`` complete or not at all. It replaces a folder of that name.

    Yields:
        A temporary folder to write into. When the block ends, every file is flushed to the disk and the folder is
        renamed to ``path``. When the block raises, the temporary folder is removed.

    Raises:
        WriteError: the disk is full or not writable.
    """
    aside = path.with_name(f"{_TEMPORARY}{path.name}")
    with saving(path):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            yield aside
            for item in sorted(aside.rglob("*")):
                if item.is_file():
                    item.chmod(_file_mode())  # safetensors lets only the owner read its files
                _fsync(item)
            _fsync(aside)
            remove_folder(path)
            os.rename(aside, path)
            _fsync(path.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def remove_folder(path: Path) -> None:
    """Remove a folder. It is renamed first, so that a crash in between leaves no half of it under its own name."""
    if path.exists():
        trash = path.with_name(f"{_TRASH}{path.name}")
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files and folders that a killed process has left in ``path``."""
    for item in path.glob(".t*-*") if path.is_dir() else ():
        if item.name.startswith((_TEMPORARY, _TRASH)):
            shutil.rmtree(item) if item.is_dir() else item.unlink()


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn any error that a full or read-only disk causes, whichever library raises it, into a :class:`WriteError`."""
    try:
        yield
    except Exception as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        raise WriteError(
            f"cannot write {path}: {reason}. {_free(path)}What was saved before is sound: make room, then continue "
            "with --resume (--keep 1 keeps fewer checkpoints, a larger --save-every writes fewer)."
        ) from error


class Lines:
    """A JSON-lines file to which rows are appended, one at a time."""

    def __init__(self, path: Path, *, keep: int) -> None:
        """Open ``path``, and remove the rows whose ``step`` is above ``keep``: a resumed run writes them again."""
        self.path = path
        kept = [line for line in _sound_lines(path) if json.loads(line)["step"] <= keep]
        write_text(path, "".join(kept))
        with saving(path):
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def append(self, row: dict[str, Any]) -> None:
        """Write one row, and pass it to the kernel, so that it is not lost if the process is killed."""
        with saving(self.path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Flush the rows to the disk, so that they are not lost in a power cut either."""
        with saving(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file, without a last line that a crash has cut short."""
    return [json.loads(line) for line in _sound_lines(path)]


@contextlib.contextmanager
def run_lock(output: Path) -> Iterator[None]:
    """Lock ``output``, so that two runs never write into one folder. The lock ends with the block or the process.

    Raises:
        OutputError: another process has locked it, or the folder cannot be made.
    """
    path = output / ".lock"
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(f"output = {str(output)!r}: {error.strerror}; name a writable folder with --output") from None
    with contextlib.closing(os.fdopen(descriptor, "r+")) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = file.read().strip() or "unknown"
            raise OutputError(
                f"output = {str(output)!r}: another run is writing there (process {owner}); wait for it, or choose "
                "another --output"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _file_mode() -> int:
    mask = os.umask(0)  # it can be read only by setting it
    os.umask(mask)
    return 0o666 & ~mask


def _sound_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")]


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(error: BaseException | None) -> str | None:
    # safetensors and torch wrap the system's error in their own types; its number is in the chain or in the message.
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return error.strerror
        for code in _DISK_ERRORS:
            if f"(os error {code})" in str(error):
                return os.strerror(code)
        error = error.__cause__ or error.__context__
    return None


def _free(path: Path) -> str:
    for parent in path.parents:
        if parent.is_dir():
            return f"{shutil.disk_usage(parent).free / 2**20:,.0f} MiB are free there. "
    return ""
