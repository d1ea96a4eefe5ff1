"""Carries the values of small tensors through NCCL's collectives.

A collective's CUDA kernel runs first and makes every allocation that a real card would see; the stub of NCCL moves no
data. Then the ranks tell each other the values of small tensors (see ``exchange.py``), and the result is written where
the collective would leave it. Small tensors carry objects, sizes and flags. The values of large tensors are not
carried, so what a collective leaves in them is unknown.

Whether a piece is carried depends only on its type and size, so that sender and receiver decide alike.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from pytest_vram import torch_private
from pytest_vram.drygpu.process import buckets
from pytest_vram.drygpu.values import contents, exchange, kernels, known_values, reductions
from pytest_vram.drygpu.values.exchange import UNKNOWN, Value

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_vram.drygpu.values.exchange import Exchange

SAME_RANKS = "other ranks taken as this one"
"""The assumption of a process that runs as one rank of many without the others: they hold what this rank holds."""

Tensors = list[torch.Tensor]


def install(library: torch.library.Library) -> None:
    """Register the collectives' kernels in ``library``, a fragment of the namespace ``c10d``."""
    buckets.install()
    for name, (group_at, prepare) in _COLLECTIVES.items():
        known = hasattr(torch.ops.c10d, name)  # torch 2.11 has no gather_into_tensor_
        if known and torch_private.has_kernel(f"c10d::{name}", "CUDA"):
            overload = getattr(torch.ops.c10d, name).default
            kernels.put_in_front(library, overload, functools.partial(_kernel, name.strip("_"), group_at, prepare))
    reductions.install()


def _kernel(
    name: str, group_at: int, prepare: Callable[..., Callable[[], None]], call: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a function that makes the collective's kernel from torch's own.

    ``prepare`` reads the inputs before the call, because a collective may overwrite them, and returns the function to
    run after the call.
    """

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        group = torch.distributed.ProcessGroup.unbox(args[group_at])
        if not _over_nccl(group):
            return call(keyset, *args, **kwargs)
        own = exchange.of(group)
        if name not in _BETWEEN_TWO:
            own.arrive(name)
        finish = prepare(own, *args[:group_at], *args[group_at + 1 :])
        if name == "allreduce":
            buckets.reduced(group, args[0])
        old = buckets.let_go(group)
        result = call(keyset, *args, **kwargs)
        del old
        finish()
        return result

    return kernel


def _over_nccl(group: Any) -> bool:
    return "nccl" in torch_private.backend_name(group, "cuda")


def _from_all(own: Exchange, pieces: Tensors, what: str) -> Callable[[], list[list[Value]]]:
    """Read this rank's ``pieces``, and return a function that fetches those of all ranks and returns them by rank.

    The pieces have the same sizes on all ranks. If no piece is carried, no rank is asked, and every value is unknown.
    """
    if not any(contents.is_carried(piece) for piece in pieces):
        return lambda: [[UNKNOWN] * len(pieces)] * own.size
    number, mine = own.number("all"), [contents.read(piece) for piece in pieces]

    def ask() -> list[list[Value]]:
        found = own.all(number, mine, what)
        return [_as_alike(values) for values in found] if own.alone else found

    return ask


def _as_alike(values: list[Value]) -> list[Value]:
    return [
        value if value.data is None else Value(data=value.data, guess=value.guess or SAME_RANKS) for value in values
    ]


# -- collectives: each function reads the inputs before the call, and returns the function to run after it


def _broadcast(own: Exchange, tensors: Tensors, root: int, *_rest: Any) -> Callable[[], None]:
    what = f"broadcast from rank {root}"
    carried = [tensor for tensor in tensors if contents.is_carried(tensor)]
    values = [contents.read(tensor) for tensor in carried] if root == own.rank or own.alone else []
    number = own.number("all") if carried else 0

    def finish() -> None:
        for tensor in tensors if root != own.rank else []:
            if not contents.is_carried(tensor):
                known_values.forget(tensor)
        if not carried or own.size == 1:
            return
        if own.alone:
            found = values if root == own.rank else _as_alike(values)
        else:
            if root == own.rank:
                own.post(number, values, what)
                return
            found = own.fetch(number, root, what)
        for tensor, value in zip(carried, found, strict=True):
            contents.write(tensor, value)

    return finish


def _all_reduce(own: Exchange, tensors: Tensors, operation: Any, *_rest: Any) -> Callable[[], None]:
    reduction = reductions.name_of(operation)
    if own.size == 1:
        return _nothing
    ask = _from_all(own, tensors, "all_reduce")

    def finish() -> None:
        found = ask()
        for index, tensor in enumerate(tensors):
            contents.write(tensor, contents.reduced([values[index] for values in found], tensor.dtype, reduction))

    return finish


def _reduce(own: Exchange, tensors: Tensors, operation: Any, root: int, *_rest: Any) -> Callable[[], None]:
    reduction = reductions.name_of(operation)
    if own.size == 1:
        return _nothing
    ask = _from_all(own, tensors, f"reduce to rank {root}")

    def finish() -> None:
        found = ask()
        for index, tensor in enumerate(tensors) if root == own.rank else ():
            contents.write(tensor, contents.reduced([values[index] for values in found], tensor.dtype, reduction))

    return finish


def _all_gather(own: Exchange, outputs: list[Tensors], inputs: Tensors, *_rest: Any) -> Callable[[], None]:
    # Pieces may differ in size from rank to rank, so whether a piece is carried is decided for each one alone.
    values = [contents.read(tensor) for tensor in inputs]
    wanted = [[contents.is_carried(part) for part in parts] for parts in outputs]
    numbers = own.number("all") if any(any(flags) for flags in wanted) else None
    if numbers is not None and not own.alone:
        own.post(numbers, values, "all_gather")

    def finish() -> None:
        for index, parts in enumerate(outputs):
            for rank, part in enumerate(parts):
                if not wanted[index][rank]:
                    known_values.forget(part)
                elif rank == own.rank:
                    contents.write(part, values[index])
                elif own.alone:
                    contents.write(part, _as_alike([values[index]])[0])
                else:
                    assert numbers is not None
                    contents.write(part, own.fetch(numbers, rank, "all_gather")[index])

    return finish


def _all_gather_base(own: Exchange, output: torch.Tensor, piece: torch.Tensor, *_rest: Any) -> Callable[[], None]:
    return _all_gather_coalesced(own, [output], [piece])


def _all_gather_coalesced(own: Exchange, outputs: Tensors, pieces: Tensors, *_rest: Any) -> Callable[[], None]:
    ask = _from_all(own, pieces, "all_gather")

    def finish() -> None:
        found = ask()
        for index, (output, piece) in enumerate(zip(outputs, pieces, strict=True)):
            parts = output.view(-1).split(max(piece.numel(), 1))
            for values, part in zip(found, parts, strict=False):
                contents.write(part, values[index])

    return finish


def _reduce_scatter(
    own: Exchange, outputs: Tensors, inputs: list[Tensors], operation: Any, *_rest: Any
) -> Callable[[], None]:
    reduction = reductions.name_of(operation)
    asks = [_from_all(own, pieces, "reduce_scatter") for pieces in inputs]

    def finish() -> None:
        for output, ask in zip(outputs, asks, strict=True):
            contents.write(output, contents.reduced([values[own.rank] for values in ask()], output.dtype, reduction))

    return finish


def _reduce_scatter_base(
    own: Exchange, output: torch.Tensor, whole: torch.Tensor, operation: Any, *_rest: Any
) -> Callable[[], None]:
    return _reduce_scatter_coalesced(own, [output], [whole], operation)


def _reduce_scatter_coalesced(
    own: Exchange, outputs: Tensors, wholes: Tensors, operation: Any, *_rest: Any
) -> Callable[[], None]:
    pieces = [
        list(whole.reshape(-1).split(max(output.numel(), 1)))[: own.size]
        for output, whole in zip(outputs, wholes, strict=True)
    ]
    return _reduce_scatter(own, outputs, pieces, operation)


def _scatter(own: Exchange, outputs: Tensors, inputs: list[Tensors], root: int, *_rest: Any) -> Callable[[], None]:
    output = outputs[0]
    number = own.number("scatter") if contents.is_carried(output) else None
    values = [contents.read(piece) for piece in inputs[0]] if root == own.rank and inputs else []

    def finish() -> None:
        if number is None:
            known_values.forget(output)
        elif root == own.rank:
            for rank, value in enumerate(values):
                if rank == own.rank:
                    contents.write(output, value)
                else:
                    own.send(f"scatter/{number}/{rank}", value)
        else:
            contents.write(output, own.receive(f"scatter/{number}/{own.rank}", root, f"scatter from rank {root}"))

    return finish


def _gather(own: Exchange, outputs: list[Tensors], inputs: Tensors, root: int, *_rest: Any) -> Callable[[], None]:
    value, number = contents.read(inputs[0]), own.number("gather")
    parts = outputs[0] if outputs and root == own.rank else []
    if root != own.rank and contents.is_carried(inputs[0]):
        own.send(f"gather/{number}/{own.rank}", value)

    def finish() -> None:
        for rank, part in enumerate(parts):
            if rank == own.rank:
                contents.write(part, value)
            elif contents.is_carried(part):
                contents.write(part, own.receive(f"gather/{number}/{rank}", rank, f"gather to rank {root}"))
            else:
                known_values.forget(part)

    return finish


def _gather_base(
    own: Exchange, output: torch.Tensor, piece: torch.Tensor, root: int, *_rest: Any
) -> Callable[[], None]:
    parts = list(output.view(-1).split(max(piece.numel(), 1))) if root == own.rank else []
    return _gather(own, [parts], [piece], root)


def _all_to_all(own: Exchange, outputs: Tensors, inputs: Tensors, *_rest: Any) -> Callable[[], None]:
    number, mine = own.number("all_to_all"), contents.read(inputs[own.rank])
    what = f"all_to_all number {number}"
    for rank, piece in enumerate(inputs):
        if rank != own.rank and contents.is_carried(piece) and piece.numel():
            own.send(f"all_to_all/{number}/{own.rank}/{rank}", contents.read(piece))

    def finish() -> None:
        for rank, part in enumerate(outputs):
            if rank == own.rank:
                contents.write(part, mine)
            elif own.alone:
                contents.write(part, _as_alike([mine])[0])
            elif contents.is_carried(part) and part.numel():
                contents.write(part, own.receive(f"all_to_all/{number}/{rank}/{own.rank}", rank, what))
            else:
                known_values.forget(part)

    return finish


def _all_to_all_base(
    own: Exchange, output: torch.Tensor, whole: torch.Tensor, to: list[int], of: list[int], *_rest: Any
) -> Callable[[], None]:
    return _all_to_all(own, _split(output, to, own.size), _split(whole, of, own.size))


def _split(tensor: torch.Tensor, sizes: Sequence[int], ranks: int) -> Tensors:
    """Return the rows of a tensor by rank."""
    if tensor.dim() == 0 or not len(sizes):
        return list(tensor.reshape(-1).split(max(tensor.numel() // ranks, 1))) if tensor.numel() else [tensor] * ranks
    return list(tensor.split(list(sizes)))


def _barrier(own: Exchange, *_rest: Any) -> Callable[[], None]:
    return lambda: None if own.alone or own.size == 1 else _meet(own)


def _meet(own: Exchange) -> None:
    own.all(own.number("all"), (), "barrier")


def _send(own: Exchange, tensors: Tensors, to: int, *_rest: Any) -> Callable[[], None]:
    for tensor in tensors:
        if contents.is_carried(tensor):
            number = own.number(f"{own.rank}>{to}")
            own.send(f"{own.rank}>{to}/{number}", contents.read(tensor))
    return _nothing


def _receive(own: Exchange, tensors: Tensors, source: int, *_rest: Any) -> Callable[[], None]:
    """Receive a value; it is fetched at its first use, because a rank may start many receives before it waits."""

    def finish() -> None:
        for tensor in tensors:
            if not contents.is_carried(tensor):
                known_values.forget(tensor)
                continue
            number = own.number(f"{source}>{own.rank}")
            key = f"{source}>{own.rank}/{number}"
            known_values.expect(tensor, functools.partial(_fetched, own, key, source))

    return finish


def _fetched(own: Exchange, key: str, source: int) -> tuple[bytes | None, str]:
    value = own.receive(key, source, f"recv from rank {source}")
    return value.data, value.guess


def _receive_any(own: Exchange, tensors: Tensors, *_rest: Any) -> Callable[[], None]:
    def finish() -> None:
        for tensor in tensors:
            known_values.forget(tensor)

    return finish


def _nothing() -> None:
    """Do nothing after the call."""


_BETWEEN_TWO = ("send", "recv", "recv_any_source")
_COLLECTIVES: dict[str, tuple[int, Callable[..., Callable[[], None]]]] = {
    "_allgather_base_": (2, _all_gather_base),
    "_reduce_scatter_base_": (2, _reduce_scatter_base),
    "allgather_": (2, _all_gather),
    "allgather_into_tensor_coalesced_": (2, _all_gather_coalesced),
    "allreduce_": (1, _all_reduce),
    "allreduce_coalesced_": (1, _all_reduce),
    "alltoall_": (2, _all_to_all),
    "alltoall_base_": (2, _all_to_all_base),
    "barrier": (1, _barrier),
    "broadcast_": (1, _broadcast),
    "gather_": (2, _gather),
    "gather_into_tensor_": (2, _gather_base),
    "recv_": (1, _receive),
    "recv_any_source_": (1, _receive_any),
    "reduce_": (1, _reduce),
    "reduce_scatter_": (2, _reduce_scatter),
    "reduce_scatter_tensor_coalesced_": (2, _reduce_scatter_coalesced),
    "scatter_": (2, _scatter),
    "send": (1, _send),
}
"""For each operator, the position of the process group among its arguments, and the function above that handles it."""
