"""DistributedDataParallel's first buckets, held as long as a real card holds them.

The first backward pass reduces gradients in buckets that DDP replaces before the second forward pass, when it knows in
which order gradients come. NCCL's process group keeps every tensor of a collective that nobody waited for, DDP's
buckets among them: a thread looks every 100 ms which collectives the card has finished, and the group's next collective
lets go of those that it found (``ProcessGroupNCCL::Watchdog::runLoop``, ``workEnqueue`` and ``shelvesToUnstash_``). On
a card the host runs ahead: when it makes the new buckets, the card still computes, so the old ones are still held. They
go with the group's first collective of the second step. A dry card is done at once; whether the thread had looked by
then was a matter of chance, and so was the peak, by a whole set of gradients.

So here both happen at the moments at which a card does them: the old buckets stay while the new ones are made, and go
with the next collective. A program that waits for the card and then idles 100 ms between the two steps needs one set of
gradients less on a real card.

Private in torch: ``Reducer._rebuild_buckets`` and ``ProcessGroup._wait_for_pending_works`` (in 2.11 to 2.14). This
module may go when NCCL's process group lets go of finished work by itself at a moment that the program decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from pytest_vram import torch_private
from pytest_vram.drygpu import driver
from pytest_vram.drygpu.values.known_values import Known
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

_recent: dict[int, tuple[str, Known]] = {}
"""Group and storage of what the last backward pass reduced, by address. Weak: it keeps no memory alive."""

_held: list[tuple[str, torch.UntypedStorage]] = []
"""Old buckets, by group, until its next collective."""


def install() -> None:
    """From now on, hold the old buckets while DDP makes the new ones. A second call does nothing."""
    reducer: Any = getattr(torch.distributed, "Reducer", None)
    rebuild = getattr(reducer, "_rebuild_buckets", None)
    if rebuild is None or getattr(rebuild, "holds_old_buckets", False):
        return

    def _rebuild_buckets(self: Any) -> Any:
        old = [(group, found) for group, entry in _recent.values() if (found := _storage(entry)) is not None]
        _recent.clear()
        rebuilt = rebuild(self)
        if rebuilt and old:
            _held.extend(old)
            size = format_bytes(sum(found.nbytes() for _, found in old))
            driver.add_note(
                f"DistributedDataParallel: its first buckets ({size}) are held until the first collective of the second"
                " step, as on a card that the program does not wait for"
            )
        return rebuilt

    _rebuild_buckets.holds_old_buckets = True  # type: ignore[attr-defined]  # a mark on the function
    reducer._rebuild_buckets = _rebuild_buckets


def reduced(group: Any, tensors: Iterable[torch.Tensor]) -> None:
    """A group is about to reduce these tensors: within a backward pass they may be DDP's buckets."""
    if not torch_private.in_backward_pass():
        return
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            _recent[storage.data_ptr()] = (group.group_name, Known(storage))


def let_go(group: Any) -> list[torch.UntypedStorage]:
    """A group's next collective begins: wait until its thread has seen that all before are done.

    Returns:
        The old buckets, which the caller drops once the collective has been started.
    """
    if not any(name == group.group_name for name, _ in _held):
        return []
    if hasattr(group, "_wait_for_pending_works"):
        group._wait_for_pending_works()
    old = [storage for name, storage in _held if name == group.group_name]
    _held[:] = [(name, storage) for name, storage in _held if name != group.group_name]
    return old


def _storage(entry: Known) -> torch.UntypedStorage | None:
    """The storage, if it is still there with the memory that it had."""
    if not entry.alive():
        return None
    found: torch.UntypedStorage = torch.UntypedStorage._new_with_weak_ptr(entry.weak)
    return found
