"""All that this package uses of torch's private interface: one function each, and the versions that have the name.

The functions import torch when they are called, so that an import of this module brings in no torch. They look a name
up at each call: a program, or this package, may have put a function of its own in its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from torch import UntypedStorage

TESTED = "2.6 to 2.15"
NAMES = (
    "torch.cuda._lazy_call",
    "torch.cuda._tls",
    "torch.cuda.memory._record_memory_history",
    "torch.cuda.memory._dump_snapshot",
    "torch._C._cuda_isHistoryEnabled",
    "torch._C._cuda_memorySnapshot",
    "torch._C._cuda_memoryStats",
    "torch._C._cuda_resetPeakMemoryStats",
    "torch._C._cuda_resetAccumulatedMemoryStats",
    "torch._C._cuda_clearCublasWorkspaces",
    "torch._C.DisableTorchFunctionSubclass",
    "torch._C._current_graph_task_id",
    "torch._C.DispatchKey.CUDA",
    "torch._C.DispatchKey.BackendSelect",
    "torch._C._dispatch_has_kernel",
    "torch._C._dispatch_get_registrations_for_dispatch_key",
    "torch._C._dispatch_has_kernel_for_dispatch_key",
    "torch._C._dispatch_keyset_full_after",
    "torch.distributed.distributed_c10d._update_default_pg",
    "torch.distributed.distributed_c10d._world",
    "torch.UntypedStorage._weak_ref",
    "torch.UntypedStorage._new_with_weak_ptr",
    "torch.UntypedStorage._free_weak_ref",
    "torch.UntypedStorage._cdata",
)
"""Names that every torch of ``TESTED`` built for CUDA has. A build without CUDA lacks those with ``_cuda_``."""

HISTORY_SETTERS = ("_cuda_record_memory_history", "_cuda_record_memory_history_legacy")
"""Where ``torch.cuda.memory._record_memory_history`` ends; a torch of ``TESTED`` has one of them or both."""
PEAK_RESETS = ("_cuda_resetPeakMemoryStats", "_accelerator_resetPeakStats")
"""Where ``torch.cuda.reset_peak_memory_stats`` and ``torch.accelerator`` end; not every torch has the second."""
COUNT_RESETS = ("_cuda_resetAccumulatedMemoryStats", "_accelerator_resetAccumulatedStats")
"""The same of the counts that only grow."""


def put_around(name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function of ``torch._C`` with what ``around`` makes of it, where this torch has it."""
    import torch

    original = getattr(torch._C, name, None)
    if original is not None:
        setattr(torch._C, name, around(original))


def when_cuda_starts(action: Callable[[], None]) -> None:
    """Call ``action`` once there is a CUDA context, now if there is one: ``torch.cuda._lazy_call``."""
    import torch

    torch.cuda._lazy_call(action)


def when_group_changes(action: Callable[[], None]) -> None:
    """Call ``action`` after torch's default process group was made or destroyed: ``_update_default_pg``.

    Nothing is done in a build of torch that has no process groups.
    """
    import torch.distributed

    if not torch.distributed.is_available():
        return
    from torch.distributed import distributed_c10d

    original = distributed_c10d._update_default_pg

    def update(group: Any) -> None:
        original(group)
        action()

    distributed_c10d._update_default_pg = update  # type: ignore[assignment]  # a patch


def group_store(group: Any) -> Any:
    """Return the store of a process group: ``distributed_c10d._world`` has it where groups do not tell."""
    import torch.distributed

    if hasattr(group, "get_group_store"):  # torch 2.14, and perhaps earlier versions
        return group.get_group_store()
    return torch.distributed.distributed_c10d._world.pg_map[group][1]


def backend_name(group: Any, device: str) -> str:
    """Return the name of the backend that a process group uses on a kind of device: ``ProcessGroup._get_backend``."""
    import torch

    return str(group._get_backend(torch.device(device)).name())


def cuda_is_starting() -> bool:
    """Whether this thread makes the CUDA context just now: ``torch.cuda._tls``."""
    import torch

    return hasattr(torch.cuda._tls, "is_initializing")


def record_history(max_entries: int, **how: Any) -> None:
    """Start torch's memory history with Python stacks: ``torch.cuda.memory._record_memory_history``."""
    import torch

    torch.cuda.memory._record_memory_history(max_entries=max_entries, stacks="python", **how)


def end_history() -> None:
    """End torch's memory history and forget what it holds: ``torch.cuda.memory._record_memory_history``."""
    import torch

    torch.cuda.memory._record_memory_history(enabled=None)


def history_is_on() -> bool:
    """Whether torch records its memory history: ``torch._C._cuda_isHistoryEnabled``.

    Ask only once there is an allocator: before, the question ends the process.
    """
    import torch

    return bool(torch._C._cuda_isHistoryEnabled())


def memory_snapshot() -> Mapping[str, Any]:
    """Return segments, traces and settings of the allocator: ``torch._C._cuda_memorySnapshot``."""
    import torch

    snapshot: Any = torch._C._cuda_memorySnapshot
    try:
        found: Mapping[str, Any] = snapshot(None)
    except TypeError:  # torch 2.6 has one memory pool, and no argument that names it
        found = snapshot()
    return found


def dump_snapshot(path: str) -> None:
    """Write the snapshot that https://pytorch.org/memory_viz reads: ``torch.cuda.memory._dump_snapshot``."""
    import torch

    torch.cuda.memory._dump_snapshot(path)


def memory_stats(index: int) -> dict[str, Any]:
    """Return the allocator's counts of one device, nested: ``torch._C._cuda_memoryStats``."""
    import torch

    found: dict[str, Any] = torch._C._cuda_memoryStats(index)
    return found


def reset_peak(index: int) -> None:
    """Start a device's peaks from what is held now: ``torch._C._cuda_resetPeakMemoryStats``."""
    import torch

    torch._C._cuda_resetPeakMemoryStats(index)


def memory_fraction(device: Any) -> float:
    """Return the share of the card's memory that the allocator may take.

    This is a public function from torch 2.7 on. torch 2.6 does not tell the fraction, so the result is 1 there.
    """
    import torch

    get = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if get is None else float(get(device))


def clear_blas_workspaces() -> None:
    """Free the workspaces of cuBLAS: ``torch._C._cuda_clearCublasWorkspaces``."""
    import torch

    torch._C._cuda_clearCublasWorkspaces()


def empty_host_cache() -> None:
    """Return pinned host memory that nothing uses to the system, if this version of torch can.

    ``torch.accelerator.empty_host_cache`` does nothing until memory of the device was allocated.
    """
    import torch

    if (empty := getattr(torch._C, "_host_emptyCache", None)) is not None:
        empty()


def plain_tensors() -> AbstractContextManager[Any]:
    """Return a context in which no tensor subclass runs code of its own: ``torch._C.DisableTorchFunctionSubclass``."""
    import torch

    context: AbstractContextManager[Any] = torch._C.DisableTorchFunctionSubclass()
    return context


def in_backward_pass() -> bool:
    """Whether autograd runs in this thread."""
    return backward_pass() != -1


def backward_pass() -> int:
    """Return the number of the backward pass that runs in this thread; -1 if none does: ``_current_graph_task_id``."""
    import torch

    return int(torch._C._current_graph_task_id())


def dispatch_key(name: str) -> Any:
    """Return a key of the dispatcher, ``CUDA`` or ``BackendSelect``: ``torch._C.DispatchKey``."""
    import torch

    return getattr(torch._C.DispatchKey, name)


def has_kernel(label: str, key: str | None = None) -> bool:
    """Whether the dispatcher knows an operator, or with ``key`` has a kernel of its own for that key.

    These are ``torch._C._dispatch_has_kernel`` and ``torch._C._dispatch_has_kernel_for_dispatch_key``.
    """
    import torch

    if key is None:
        return bool(torch._C._dispatch_has_kernel(label))
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(label, key))


def operators_with_kernel(namespace: str, key: str) -> list[tuple[str, str]]:
    """Return the name and the overload's name ("" for the default) of every operator that has a kernel for ``key``.

    The list is ``torch._C._dispatch_get_registrations_for_dispatch_key``.
    """
    import torch

    begin = f"{namespace}::"
    labels = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    names = sorted(label.removeprefix(begin) for label in labels if label.startswith(begin))
    return [(name, overload) for name, _, overload in (label.partition(".") for label in names)]


def keys_after(key: Any) -> Any:
    """Return all keys that the dispatcher tries after one: ``torch._C._dispatch_keyset_full_after``."""
    import torch

    return torch._C._dispatch_keyset_full_after(key)


def storage_number(storage: UntypedStorage) -> int:
    """Return a number that no other living storage has: the address of its object, ``UntypedStorage._cdata``."""
    return int(storage._cdata)


def weak_storage(storage: UntypedStorage) -> Any:
    """Return a weak reference to a storage, which :func:`release_weak_storage` frees: ``UntypedStorage._weak_ref``.

    The reference does not need the storage's Python object, which may come and go.
    """
    return storage._weak_ref()


def strong_storage(weak: Any) -> UntypedStorage | None:
    """Return the storage of a weak reference; None if it is gone: ``UntypedStorage._new_with_weak_ptr``."""
    import torch

    found: UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(weak)
    return found


def release_weak_storage() -> Callable[[Any], Any]:
    """Return the function that frees a reference of :func:`weak_storage`: ``UntypedStorage._free_weak_ref``.

    Whoever keeps the function can call it while the interpreter shuts down, when nothing can be imported.
    """
    import torch

    release: Callable[[Any], Any] = torch.UntypedStorage._free_weak_ref
    return release
