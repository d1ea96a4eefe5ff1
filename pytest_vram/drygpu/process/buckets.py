"""Hold DistributedDataParallel's first buckets, and what its communication hooks send, as long as a card does.

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

A communication hook (``fp16_compress_hook``, PowerSGD) sends tensors of its own, for which nobody waits either: those
of a whole backward pass are held until the next step's first collective.

Private in torch: ``Reducer._rebuild_buckets``, ``ProcessGroup._wait_for_pending_works``, ``_register_comm_hook`` and
``_register_builtin_comm_hook`` (in 2.11 to 2.14). This module may go when NCCL's process group lets go of finished work
by itself at a moment that the program decides.
"""

from __future__ import annotations

import functools
import sys
import threading
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from pytest_vram import torch_private
from pytest_vram.drygpu import driver
from pytest_vram.drygpu.values.known_values import Known
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_recent: dict[int, tuple[str, Known]] = {}
"""Group and storage of what the last backward pass reduced, by address. Weak: it keeps no memory alive."""

_held: list[tuple[str, int, torch.UntypedStorage]] = []
"""Group and storage of old buckets, and of what a hook sent, until the group's next collective outside of the backward
pass with the number between them."""

_hook = threading.local()
"""``running``: whether a communication hook in Python runs in this thread."""

_builtin = False
"""Whether a communication hook in C++ was registered in this process."""


def install() -> None:
    """From now on, hold the old buckets while DDP makes the new ones, and what its hooks send.

    A second call does nothing.
    """
    reducer: Any = getattr(torch.distributed, "Reducer", None)
    rebuild = getattr(reducer, "_rebuild_buckets", None)
    if rebuild is None or getattr(rebuild, "holds_old_buckets", False):
        return

    def _rebuild_buckets(self: Any) -> Any:
        old = [(group, found) for group, entry in _recent.values() if (found := entry.storage()) is not None]
        _recent.clear()
        rebuilt = rebuild(self)
        if rebuilt and old:
            _held.extend((group, torch_private.backward_pass(), found) for group, found in old)
            size = format_bytes(sum(found.nbytes() for _, found in old))
            driver.add_note(
                f"DistributedDataParallel: its first buckets ({size}) are held until the first collective of the second"
                " step, as on a card that the program does not wait for"
            )
        return rebuilt

    _rebuild_buckets.holds_old_buckets = True  # type: ignore[attr-defined]  # a mark on the function
    reducer._rebuild_buckets = _rebuild_buckets
    _watch_hooks()


def _watch_hooks() -> None:
    module: Any = torch.distributed
    in_python, in_c = module._register_comm_hook, module._register_builtin_comm_hook

    def _register_comm_hook(reducer: Any, state: Any, hook: Callable[..., Any]) -> Any:
        @functools.wraps(hook)
        def run(*arguments: Any) -> Any:
            _hook.running = True
            try:
                return hook(*arguments)
            finally:
                _hook.running = False

        return in_python(reducer, state, run)

    def _register_builtin_comm_hook(*arguments: Any) -> Any:
        global _builtin
        _builtin = True
        return in_c(*arguments)

    torch_private.when_group_changes(_held.clear)  # what a group holds goes with it
    module._register_comm_hook, module._register_builtin_comm_hook = _register_comm_hook, _register_builtin_comm_hook


def reduced(group: Any, tensors: Iterable[torch.Tensor]) -> None:
    """Note tensors that a group is about to reduce. In a backward pass they may be DDP's buckets, or what a hook sends.

    The caller is the collective's kernel, called by the dispatcher.
    """
    if not torch_private.in_backward_pass():
        return
    hooked = getattr(_hook, "running", False) or (_builtin and _from_c(sys._getframe(1)))
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            continue
        if not hooked:
            _recent[storage.data_ptr()] = (group.group_name, Known(storage))
        else:
            _held.append((group.group_name, torch_private.backward_pass(), storage))
            driver.add_note(
                "DistributedDataParallel: what its communication hook sends in a backward pass is held until the next"
                " step's first collective, as on a card that the program does not wait for"
            )


def _from_c(kernel: Any) -> bool:
    """Whether no Python code called the kernel with this frame: then it was DDP's reducer."""
    return kernel.f_back is None


def let_go(group: Any) -> list[torch.UntypedStorage]:
    """Wait, as a group's collective begins, until its thread has seen that those before this backward pass are done.

    Returns:
        The old buckets and what hooks sent, which the caller drops once the collective has been started.
    """
    now = torch_private.backward_pass()
    done = [entry for entry in _held if entry[0] == group.group_name and (entry[1] != now or now == -1)]
    if not done:
        return []
    if hasattr(group, "_wait_for_pending_works"):
        group._wait_for_pending_works()
    _held[:] = [entry for entry in _held if not any(entry is other for other in done)]
    return [storage for *_, storage in done]
