"""Several processes that train one model: how they join, what they tell each other, and how they end together.

Rank 0 prints and writes. What the ranks agree on (a signal, a checkpoint's random states) goes through a gloo group of
its own on the CPU, so that a rank may wait there for rank 0 without an operation pending on its card.

A run ends as a whole. The first rank that fails writes its message and its exit code into the launcher's store, and
prints the message. Every other rank watches the store, and ends with the same exit code.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import socket
import threading
import time
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from finetune import launch
from finetune.errors import ConfigError, ExitCode, FinetuneError, OtherRankError, Problem, RankLostError
from pytest_vram.probe.reporter import now, runs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from finetune.config.settings import RunConfig

_T = TypeVar("_T")

_FAILURE = "failure"
_PATIENCE = datetime.timedelta(days=1)  # rank 0 may merge a large model while the others wait for it
_LOOK_EVERY, _GRACE, _UNTIL_SAID = 0.5, 5.0, 1.0  # seconds
_PEER_GONE = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|socket closed|failed to (recv|send)|timed out waiting",
    re.IGNORECASE,
)

_control: Any = None
_alone = False


def together() -> bool:
    """Return whether this process belongs to a process group of several ranks."""
    return not _alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Compute inside the block as a run of one process, so that a rank that fails leaves no other one waiting."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


@contextlib.contextmanager
def joined(config: RunConfig) -> Iterator[None]:
    """Join the run that a launcher started, as one of its ranks, inside the block. Do nothing for a single process.

    Raises:
        ConfigError: the machine has fewer GPUs than ranks, or a step has fewer micro-batches than there are ranks.
        OtherRankError: another rank has failed, and has printed its message.
        RankLostError: another rank is gone without a message.
    """
    global _control
    if launch.size() == 1:
        yield
        return
    store = _join(config)
    processes = gathered((socket.gethostname(), os.getpid()))
    watch = _Watch(store, processes)
    try:
        require_shares(config)
        yield
        wait_for_all()
    except BaseException as error:
        settled = watch.settled(error)
        if settled is error:
            raise
        raise settled from error
    finally:
        watch.close()
    _control = None
    dist.destroy_process_group()


def _join(config: RunConfig) -> Store:
    global _control
    on_gpu = config.model.device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        _require_cards()
        torch.cuda.set_device(launch.local_rank())
    store, rank, size = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=PrefixStore("finetune", store), rank=rank, world_size=size)
    _control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return PrefixStore("finetune-failure", store)


def _require_cards() -> None:
    count, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", launch.size()))
    if ranks <= count:
        return
    why = f"this machine has {count} GPU{'s' * (count != 1)}, and each rank needs one"
    if not launch.is_first():  # every rank checks this by itself, before the ranks are connected
        raise OtherRankError(why, ConfigError.exit_code)
    remedy = f"use torchrun --nproc-per-node {count}"
    raise ConfigError(Problem(field="nproc-per-node", value=ranks, why=why, remedy=remedy))


def require_shares(config: RunConfig) -> None:
    """Refuse a run in which a rank would never have anything to do.

    Raises:
        ConfigError: a step has fewer micro-batches than there are ranks.
    """
    ranks, count = launch.size(), config.train.accumulation
    if count < ranks:
        raise ConfigError(
            Problem(
                field="accumulation",
                value=count,
                why=f"each of the {ranks} ranks takes whole micro-batches, and a step has only {count}",
                remedy=f"use --accumulation {ranks} or more (or a larger --batch), and a smaller --micro-batch for the "
                "same rows in a step",
            )
        )


def share(items: Iterable[_T]) -> list[_T]:
    """Return this rank's part of ``items``: with N ranks, every N-th item.

    A window's micro-batches are sorted by length, so that the ranks get parts of about equal length. If there are fewer
    items than ranks, some ranks get none.
    """
    return list(islice(items, launch.rank(), None, launch.size())) if together() else list(items)


def wait_for_all() -> None:
    """Wait until every rank is here."""
    if together():
        dist.barrier(group=_control)


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Run the block in rank 0 first, and then in the other ranks, which find the caches filled."""
    if not launch.is_first():
        wait_for_all()
    yield
    if launch.is_first():
        wait_for_all()


def any_of(flag: bool) -> bool:
    """Return whether ``flag`` is true in any rank."""
    if not together():
        return flag
    found = torch.tensor([int(flag)])
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=_control)
    return bool(found.item())


def of_first(value: _T) -> _T:
    """Return rank 0's ``value``, in every rank."""
    if not together():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_control, device=torch.device("cpu"))
    return values[0]


def summed(*numbers: float) -> list[float]:
    """Return each number's sum over the ranks, in fp64."""
    if not together():
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total, group=_control)
    return [float(number) for number in total.tolist()]


def gathered(value: _T) -> list[_T]:
    """Return every rank's ``value``, by rank."""
    if not together():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_control)
    return values


def gathered_rows(part: torch.Tensor, rows: int) -> torch.Tensor | None:
    """Return a tensor of which every rank has a part, as ``torch.chunk`` cuts it along the first dimension.

    Args:
        part: [n, ...] on the CPU. The last ranks may have fewer rows than the others, or none.
        rows: the rows of all parts.

    Returns:
        The tensor [rows, ...] in rank 0; None in the other ranks.
    """
    count = dist.get_world_size()
    padded = part.new_zeros((-(-rows // count), *part.shape[1:]))
    padded[: len(part)] = part
    flat = padded.flatten().view(torch.uint8)  # gloo does not know every dtype
    parts = [torch.empty_like(flat) for _ in range(count)] if launch.is_first() else None
    dist.gather(flat, parts, dst=0, group=_control)
    if parts is None:
        return None
    return torch.cat(parts).view(part.dtype).view(-1, *part.shape[1:])[:rows].clone()


def require_same(**facts: Any) -> None:
    """Check that each of the facts is the same in every rank.

    Raises:
        ConfigError: a rank has another value than rank 0, such as another checkpoint or other rows.
    """
    by_rank = gathered(json.loads(json.dumps(facts)))
    problems = [
        Problem(
            field=name,
            value=values[name],
            why=f"rank {rank} has this, and rank 0 has {by_rank[0][name]!r}",
            remedy="give every rank the same model, data and output folder",
        )
        for rank, values in enumerate(by_rank)
        for name in facts
        if values[name] != by_rank[0][name]
    ]
    if problems:
        raise ConfigError(*problems)


def seed_of(seed: int, *, done: int) -> int:
    """Return the seed of this rank's random generators, which dropout uses.

    Args:
        seed: the seed of the run. Rank 0 of a new run uses it unchanged, as a run of one process does.
        done: the steps that were done before this process started; 0 for a new run.
    """
    return seed if launch.is_first() and not done else (seed + launch.rank() + 1_000_003 * done) % 2**32


class _Watch:
    """Looks for the failure of another rank, and ends this process if it waits for that rank forever."""

    def __init__(self, store: Any, processes: list[tuple[str, int]]) -> None:
        self._store, self._processes = store, processes
        self._began = now()
        self._done = threading.Event()
        self._seen: Any = None
        # A store serves one thread at a time, and a call of the main thread may wait for long. So this thread gets its
        # own connection.
        apart = store.clone() if hasattr(store, "clone") else store
        self._thread = threading.Thread(target=self._look, args=(apart,), name="other ranks", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._done.set()
        self._thread.join()

    def settled(self, error: BaseException) -> BaseException:
        """Return the error with which this rank ends: its own, which it tells the other ranks, or another rank's."""
        known = self._seen or self._known(self._store)
        if known is None:
            own = self._lost(error) if _is_gone(error) else error
            code = own.exit_code if isinstance(own, FinetuneError) else ExitCode.BUG
            failure = {"rank": launch.rank(), "code": int(code), "message": str(own) or type(own).__name__}
            try:
                text = json.dumps(failure)
                known = json.loads(self._store.compare_set(_FAILURE, "", text))
            except RuntimeError:  # the store was on the machine of a rank that is gone
                return own
            if known["rank"] == launch.rank():
                if launch.is_first():  # without a launcher the store ends with this process: let the others read it
                    time.sleep(2 * _LOOK_EVERY)
                return own
        time.sleep(_UNTIL_SAID)  # the launcher ends all ranks when one ends: let the failed one print its message
        return _of_other(known)

    def _look(self, store: Any) -> None:
        while not self._done.wait(_LOOK_EVERY):
            try:
                known = self._known(store, quietly=False)
            except RuntimeError:  # the launcher or the rank that had the store is gone, so that no rank can be told
                if not self._done.wait(_GRACE):
                    os._exit(ExitCode.RANK_LOST)
                return
            if known is not None:
                self._seen = known
                if not self._done.wait(_GRACE):  # the rank waits for its card forever, and no signal reaches Python
                    os._exit(known["code"])
                return

    @staticmethod
    def _known(store: Any, *, quietly: bool = True) -> Any:
        try:
            return json.loads(store.get(_FAILURE)) if store.check([_FAILURE]) else None
        except RuntimeError:
            if quietly:
                return None
            raise

    def _lost(self, error: BaseException) -> RankLostError:
        time.sleep(_UNTIL_SAID)  # the system takes a moment to know that the process is dead
        here = socket.gethostname()
        gone = [
            f"rank {rank} (process {number})"
            for rank, (host, number) in enumerate(self._processes)
            if host == here and not runs(number, self._began)
        ]
        who = " and ".join(gone) or "another rank"
        verb = "are" if len(gone) > 1 else "is"
        return RankLostError(
            f"{who} {verb} gone without a message, killed perhaps ({str(error).strip().splitlines()[0][:120]}). What "
            "was saved is sound: start all ranks again, with --resume"
        )


def _of_other(failure: Any) -> OtherRankError:
    return OtherRankError(f"rank {failure['rank']} ended this run: {failure['message']}", ExitCode(failure["code"]))


def _is_gone(error: BaseException) -> bool:
    """Return whether an error says that another rank cannot be reached."""
    distributed = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    return distributed and _PEER_GONE.search(str(error)) is not None
