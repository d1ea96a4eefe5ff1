"""List the places where a program reads values back from a dry GPU, and whether each value is the program's own.

The stub library calls ``on_read`` before every copy from the device to the host. Operators that are about to read
announce it with ``reading``. For a read that was not announced, the storage is looked up by its address.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_vram.code_owner import frames, innermost, owner, shown
from pytest_vram.memory.measurement import HostRead

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_DISTRIBUTIONS = os.path.join("torch", "distributions", "")
UNKNOWN_NOTE = "computed on the device: read as zero"
_MANY = 10_000
"""A program that has made so many reads of one kind at one line may wait there for a value that never comes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """A read that an operator is about to make.

    Attributes:
        operation: the operator's name.
        known: whether the value is known. It is the program's own, unless ``guess`` names an assumption.
        guess: the assumption that a known value rests on; ``""`` if there is none.
        count: if set, every read returns this number. It is the size of a result that depends on unknown data.
        whole: whether reads by operators that this one calls are listed under this operator's name.
    """

    operation: str
    known: bool = True
    guess: str = ""
    count: int | None = None
    whole: bool = False


class _Current(threading.local):
    announced: Announced | None = None


_current = _Current()
_lock = threading.Lock()
_reads: dict[tuple[str, str, bool, str], int] = {}


@contextlib.contextmanager
def reading(announced: Announced) -> Iterator[None]:
    """Announce the reads that are made within this context."""
    outer = _current.announced
    if outer is None or not outer.whole:
        _current.announced = announced
    try:
        yield
    finally:
        _current.announced = outer


def note(operation: str, *, answered: bool, remark: str = "") -> None:
    """Add one read by the running code to the list."""
    location, inner = _where(sys._getframe(1))
    guessed = bool(remark)
    remark = "; ".join(part for part in (remark, inner) if part)
    key = (location, operation, answered, remark)
    with _lock:
        _reads[key] = count = _reads.get(key, 0) + 1
    if count == _MANY and guessed:
        print(_told_of_many(location, operation, remark), file=sys.stderr, flush=True)


def _told_of_many(location: str, operation: str, remark: str) -> str:
    return (
        f"pytest-vram: {location} has read {_MANY:,} values that rest on a guess ({operation}: {remark}). A dry GPU "
        "computes nothing, so a loop that waits there for a value to change does not end."
    )


def collect() -> tuple[HostRead, ...]:
    """Return every place that read since the last ``reset``: unanswered reads first, then the most frequent."""
    with _lock:
        reads = [
            HostRead(location=location, operation=operation, count=count, answered=answered, note=remark)
            for (location, operation, answered, remark), count in _reads.items()
        ]
    return tuple(sorted(reads, key=lambda read: (read.answered, -read.count, read.location)))


def since(earlier: tuple[HostRead, ...]) -> tuple[HostRead, ...]:
    """Return the reads since ``earlier = collect()``, with their counts since then."""
    before = {(read.location, read.operation, read.answered, read.note): read.count for read in earlier}
    grown = (
        replace(read, count=read.count - before.get((read.location, read.operation, read.answered, read.note), 0))
        for read in collect()
    )
    return tuple(read for read in grown if read.count > 0)


def reset() -> None:
    """Empty the list in a forked child, with a new lock: a thread of the parent may have held the old one."""
    global _lock
    _lock = threading.Lock()
    _reads.clear()


def on_read(address: int, size: int, marked: bool, destination: int) -> bool:
    """List a copy of ``size`` bytes from ``address`` to ``destination`` that the stub library is about to make.

    ``marked`` tells whether the stub knows every byte.

    Returns:
        Whether ``destination`` holds the answer already, so that the stub copies nothing.
    """
    try:
        return _answer(address, size, marked, destination)
    except Exception as error:  # an exception cannot pass through C
        print(f"pytest-vram: a host read of {size} bytes could not be listed: {error!r}", file=sys.stderr)
        return False


def _answer(address: int, size: int, marked: bool, destination: int) -> bool:
    announced = _current.announced
    if announced is None:
        from pytest_vram.drygpu.values import known_values

        entry = known_values.find_address(address)
        known = entry is not None and marked and entry.knows(address, size)
        announced = Announced(operation="copy to host", known=known, guess=entry.guess if entry is not None else "")
    if announced.count is not None:
        ctypes.memset(destination, 0, size)
        ctypes.memmove(destination, announced.count.to_bytes(8, sys.byteorder), min(size, 8))
        return True
    note(announced.operation, answered=announced.known, remark=announced.guess if announced.known else UNKNOWN_NOTE)
    if announced.known or not marked:
        return False
    # The bytes that are marked as known belong to a freed tensor at the same address.
    ctypes.memset(destination, 0, size)
    return True


def is_check() -> bool:
    """Return whether the running code reads a boolean only to refuse values that it cannot use.

    Formulas of autograd do so, such as that of eig or of a complex svd. While they run, the only Python code on the
    stack is this package's. The constructors of ``torch.distributions`` do so too, and their samplers draw again until
    all draws are accepted.
    """
    caller = next((frame for frame in frames(sys._getframe(1)) if owner(frame.filename) != "own"), None)
    return caller is None or shown(caller.filename).startswith(_DISTRIBUTIONS)


def _where(frame: FrameType | None) -> tuple[str, str]:
    """Return the user's line, and the line of the library in which the read happened (``""`` without one)."""
    user, library, _ = innermost(frames(frame))
    inner = library.place if library else ""
    if user is None:
        return inner or "torch, outside of Python code (backward pass or a thread)", ""
    return user.place, f"in {inner}" if inner else ""
