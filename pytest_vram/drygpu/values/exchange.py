"""Exchanges small values between the ranks of a dry run, through the store of their process group.

Ranks of a dry run are real processes, so they can tell each other numbers without a GPU. Each collective has a number
in its group; a rank posts its own values under that number and fetches those of the others. A value that its owner
does not know is posted as unknown, so that nobody waits for it.

A rank that waits too long raises an error that says which ranks wait, and in which collective. The environment
variable ``PYTEST_VRAM_RANKS_TIMEOUT`` sets the seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import threading
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]  # torch documents both

from pytest_vram import torch_private
from pytest_vram.drygpu import driver

if TYPE_CHECKING:
    from collections.abc import Sequence

TIMEOUT_VARIABLE = "PYTEST_VRAM_RANKS_TIMEOUT"
_TIMEOUT = 300.0
_TELL_AFTER = 1.0  # seconds of waiting after which a rank writes to the store in which collective it waits
_GRACE = 10.0  # seconds that a rank waits before it exits for others to fetch what it sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """The values of a tensor.

    Attributes:
        data: the bytes in order of the elements; ``None`` if the tensor's owner does not know them.
        guess: the assumption that the values rest on; ``""`` if they are the program's own.
    """

    data: bytes | None = None
    guess: str = ""


UNKNOWN = Value()


class Exchange:
    """The messages of one process group, on one of its ranks.

    Attributes:
        rank, size: this rank in the group, and the number of ranks.
        alone: whether this process runs as one rank of many without the others, so that there is nobody to ask.
    """

    def __init__(self, group: Any, incarnation: int) -> None:
        self.rank, self.size = group.rank(), group.size()
        self._ranks = dist.get_process_group_ranks(group)
        self._name = group.group_desc if group.group_desc not in ("", "undefined") else group.group_name
        own: Any = torch_private.group_store(group)
        store = own
        while isinstance(store, PrefixStore):
            store = store.underlying_store
        self.alone = isinstance(store, HashStore)
        if self.alone:
            driver.stand_alone()
        # The process that serves the store must not free it before the others have read from it.
        self._kept = own
        self._store: Any = PrefixStore(f"vram/{group.group_name}/{incarnation}", _clone(own))
        self._numbers: dict[str, int] = {}
        self._lock = threading.Lock()
        self._arrived = False
        self._posted: list[str] = []  # keys for all ranks; deleted after the next collective in which all take part
        self._sent: list[str] = []  # keys for one rank, which deletes them

    def number(self, kind: str) -> int:
        """Return the number of the next collective, or of the next message between two ranks."""
        with self._lock:
            self._numbers[kind] = self._numbers.get(kind, -1) + 1
            return self._numbers[kind]

    def arrive(self, what: str) -> None:
        """Wait for all ranks before the group's first collective, as NCCL does to set up the communicator.

        Otherwise only torch would notice that a rank is missing, after ten minutes, and would not say which.
        """
        with self._lock:
            first, self._arrived = not self._arrived, True
        if first and not self.alone and self.size > 1:
            self._store.set(f"here/{self.rank}", what)
            ranks = list(range(self.size))
            self._wait([f"here/{rank}" for rank in ranks], ranks, f"{what} (the group's first collective)")

    # -- collectives: ``number`` is the collective's number in the group

    def post(self, number: int, values: Sequence[Value], what: str) -> None:
        """Make these values available to every rank."""
        key = f"{number}/{self.rank}"
        self._store.set(key, pickle.dumps((what, list(values))))
        with self._lock:
            self._posted.append(key)

    def fetch(self, number: int, rank: int, what: str) -> list[Value]:
        """Return what one rank posted.

        Raises:
            DistBackendError: if the rank did not post in time, or called another collective.
        """
        return self._get_many([f"{number}/{rank}"], [rank], number, what)[0]

    def all(self, number: int, values: Sequence[Value], what: str) -> list[list[Value]]:
        """Post ``values``, and return what each rank posted, by rank; all ranks must take part.

        Raises:
            DistBackendError: if a rank did not post in time, or called another collective.
        """
        if self.alone:
            return [list(values)] * self.size
        with self._lock:
            done, self._posted = self._posted, []
        self.post(number, values, what)
        others = [rank for rank in range(self.size) if rank != self.rank]
        found = self._get_many([f"{number}/{rank}" for rank in others], others, number, what)
        for key in done:  # a rank that takes part in this collective has finished the earlier ones
            self._store.delete_key(key)
        by_rank = dict(zip(others, found, strict=True))
        return [list(values) if rank == self.rank else by_rank[rank] for rank in range(self.size)]

    # -- from one rank to one other

    def send(self, key: str, value: Value) -> None:
        """Make a value available to one rank; ``key`` names sender, receiver and number."""
        if self.alone:
            return
        self._store.set(key, pickle.dumps(value))
        with self._lock:
            self._sent = [other for other in self._sent[-256:] if other != key] + [key]

    def receive(self, key: str, source: int, what: str) -> Value:
        """Return what rank ``source`` sent under ``key``.

        Raises:
            DistBackendError: if the value did not arrive in time.
        """
        if self.alone:
            return UNKNOWN
        self._wait([key], [source], what)
        value: Value = pickle.loads(self._store.get(key))
        self._store.delete_key(key)
        return value

    def finish(self) -> None:
        """Wait, before the process exits, until the others have fetched what was sent to them.

        They could not fetch it later if this process serves the store.
        """
        deadline = time.monotonic() + _GRACE
        with contextlib.suppress(RuntimeError):
            for key in self._sent:
                while self._store.check([key]) and time.monotonic() < deadline:
                    time.sleep(0.01)

    # -- waiting

    def _get_many(self, keys: list[str], owners: list[int], number: int, what: str) -> list[list[Value]]:
        if not keys:
            return []
        self._wait(keys, owners, f"{what} (number {number})")
        found = []
        for key, owner in zip(keys, owners, strict=True):
            theirs, values = pickle.loads(self._store.get(key))
            if theirs != what:
                raise dist.DistBackendError(
                    f"{self._title(self.rank)} calls {what} as collective number {number} of group {self._name!r}, and"
                    f" {self._title(owner)} calls {theirs}: all ranks must call the same collectives in the same order"
                )
            found.append(values)
        return found

    def _wait(self, keys: list[str], owners: list[int], what: str) -> None:
        began, pause, told = time.monotonic(), 0.0002, False
        limit = timeout()
        try:
            while not self._store.check(keys):
                waited = time.monotonic() - began
                if waited > limit:
                    missing = [r for key, r in zip(keys, owners, strict=True) if not self._store.check([key])]
                    raise dist.DistBackendError(self._stuck(missing, what, limit))
                if waited > _TELL_AFTER and not told:
                    self._store.set(f"waits/{self.rank}", f"waits in {what}".encode())
                    told = True
                time.sleep(pause)
                pause = min(pause * 1.5, 0.01)
        except dist.DistNetworkError as error:
            raise dist.DistBackendError(
                f"{self._title(self.rank)} waited in {what} for {self._names(owners)}, and the process that keeps the"
                f" group's store is gone: {error}"
            ) from error
        if told:
            self._store.delete_key(f"waits/{self.rank}")

    def _stuck(self, missing: list[int], what: str, limit: float) -> str:
        lines = [
            f"{self._title(self.rank)} waited {limit:g} s in {what} of group {self._name!r} for"
            f" {self._names(missing)} ({TIMEOUT_VARIABLE} sets the seconds):"
        ]
        for rank in range(self.size):
            state = f"waits in {what}" if rank == self.rank else self._state(rank)
            lines.append(f"  {self._title(rank)} {state}")
        return "\n".join(lines)

    def _state(self, rank: int) -> str:
        key = f"waits/{rank}"
        if self._store.check([key]):
            return str(self._store.get(key).decode())
        return "waits in no collective of this group: it computes, waits elsewhere, or has ended"

    def _names(self, ranks: list[int]) -> str:
        return ", ".join(self._title(rank) for rank in ranks)

    def _title(self, rank: int) -> str:
        """Return a rank's name by its number in the job, because that is the number that the user knows."""
        return f"rank {self._ranks[rank] if rank < len(self._ranks) else rank}"


_exchanges: weakref.WeakKeyDictionary[Any, Exchange] = weakref.WeakKeyDictionary()
_incarnations: dict[str, int] = {}
_making = threading.Lock()


def of(group: Any) -> Exchange:
    """Return the exchange of a process group; each group has its own, even if an earlier group had the same name."""
    with _making:
        found = _exchanges.get(group)
        if found is None:
            _incarnations[group.group_name] = _incarnations.get(group.group_name, -1) + 1
            found = _exchanges[group] = Exchange(group, _incarnations[group.group_name])
            if not found.alone:
                atexit.register(found.finish)
        return found


def timeout() -> float:
    """Return the seconds that a rank waits for another one.

    Raises:
        ValueError: if ``PYTEST_VRAM_RANKS_TIMEOUT`` is not a number above 0.
    """
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is None:
        return _TIMEOUT
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{TIMEOUT_VARIABLE}={text!r}: write a number of seconds above 0")
    return seconds


def _clone(store: Any) -> Any:
    """Return a separate connection to the store, so that waiting here blocks no other use of the store.

    If this version of torch cannot clone the store, return the store itself.
    """
    try:
        return store.clone()
    except (AttributeError, NotImplementedError, RuntimeError):
        return store
