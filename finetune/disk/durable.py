"""Files that survive a power cut: written aside, flushed to the disk, then renamed into place."""

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
    """Put ``text`` at ``path``: after a crash there is the old content or the new one, never a mixture."""
    aside = path.with_name(f"{_TEMPORARY}{path.name}")
    with saving(path):
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """:func:`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Fill a folder that appears at ``path`` whole, or not at all. One that is there already is replaced.

    Yields:
        The folder to write into. When the block ends every file is flushed to the disk and the folder is renamed;
        when it raises, the folder is removed.

    Raises:
        WriteError: the disk is full or refuses.
    """
    aside = path.with_name(f"{_TEMPORARY}{path.name}")
    with saving(path):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            yield aside
            for item in sorted(aside.rglob("*")):
                if item.is_file():
                    item.chmod(_file_mode())  # safetensors makes its files for the owner alone
                _fsync(item)
            _fsync(aside)
            remove_folder(path)
            os.rename(aside, path)
            _fsync(path.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def remove_folder(path: Path) -> None:
    """Remove a folder so that a crash on the way leaves nothing that looks like it."""
    if path.exists():
        trash = path.with_name(f"{_TRASH}{path.name}")
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Remove what a killed process had half written or half removed in ``path``."""
    for item in path.glob(".t*-*") if path.is_dir() else ():
        if item.name.startswith((_TEMPORARY, _TRASH)):
            shutil.rmtree(item) if item.is_dir() else item.unlink()


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn whatever a full or read-only disk makes the libraries raise into one :class:`WriteError`."""
    try:
        yield
    except Exception as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        raise WriteError(
            f"cannot write {path}: {reason}. {_free(path)}What was saved before is sound: make room, then go on with "
            "--resume (--keep 1 keeps fewer checkpoints, --save-every makes fewer)."
        ) from error


class Lines:
    """A JSON-lines file that is appended to, a line at a time."""

    def __init__(self, path: Path, *, keep: int) -> None:
        """Open ``path``, cut to the rows whose ``step`` is at most ``keep``: those after it will be written again."""
        self.path = path
        kept = [line for line in _sound_lines(path) if json.loads(line)["step"] <= keep]
        write_text(path, "".join(kept))
        with saving(path):
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; it is the kernel's afterwards, so a killed process does not lose it."""
        with saving(self.path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Flush what is written to the disk, so that a power cut does not lose it either."""
        with saving(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line that a crash cut short is left out."""
    return [json.loads(line) for line in _sound_lines(path)]


@contextlib.contextmanager
def run_lock(output: Path) -> Iterator[None]:
    """Hold ``output`` for this process, so that two runs never write into one folder. Ends with the process.

    Raises:
        OutputError: another process holds it, or the folder cannot be made.
    """
    path = output / ".lock"
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(
            f"output = {str(output)!r}: {error.strerror}; name a folder that can be written with --output"
        ) from None
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
    mask = os.umask(0)  # the only way to read it is to set it
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
    # safetensors and torch wrap the system's error in their own types; the number survives in the chain or the text.
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
