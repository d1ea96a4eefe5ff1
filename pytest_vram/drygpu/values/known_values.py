"""Which tensors of a dry GPU have values that can be believed, and CPU views of them.

Kernels of a dry GPU compute nothing. What the program copied or filled is there, though, and so is what ``values.py``
works out from it on the CPU. The stub remembers *where* something was written, in grains of 512 bytes; but the
caching allocator hands the same addresses out again, so a storage must also be listed here before its bytes are
believed. The list holds weak
references: it never keeps memory alive, and so never changes a figure.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch

from pytest_vram import torch_private
from pytest_vram.drygpu import driver
from pytest_vram.units import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

WHOLE_NUMBERS = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
"""Types that decide branches and sizes: their small tensors are carried."""

WHOLE_NUMBERS_LIMIT = 16 * MIB
"""Larger tensors of whole numbers are not carried. A one-hot routing of 2048 tokens to 8 of 128 experts takes 16
MiB."""

FLOATS_LIMIT = KIB
"""Floats are carried up to this size: scales, weights of a loss, counters kept as floats; not parameters."""

_PRUNE_EVERY = 4096


class Known:
    """A storage with believable bytes.

    Attributes:
        base: address of the storage's first byte.
        size: its bytes.
        whole: every byte is known, so that the stub need not be asked.
        guess: what the values rest on when they are not the program's own; ``""`` when they are.
    """

    __slots__ = ("base", "guess", "size", "weak", "whole")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.weak = storage._weak_ref()
        self.base = storage.data_ptr()
        self.size = storage.nbytes()
        self.whole = False
        self.guess = ""

    def __del__(self, free: Callable[[Any], Any] = torch.UntypedStorage._free_weak_ref) -> None:
        free(self.weak)  # a default argument outlives the module's own names when the interpreter shuts down

    def alive(self) -> bool:
        """The storage is there, and still has the memory that it had."""
        storage: Any = torch.UntypedStorage._new_with_weak_ptr(self.weak)
        return storage is not None and storage.data_ptr() == self.base


_known: dict[int, Known] = {}
"""By address. A tensor that is merely looked up must not get a Python object for its storage: autograd counts
references to decide whether it may add a gradient in place."""


def is_carried(tensor: torch.Tensor) -> bool:
    """Is ``tensor`` of a kind and size whose values are worth carrying?"""
    size = tensor.numel() * tensor.element_size()
    return size <= (WHOLE_NUMBERS_LIMIT if tensor.dtype in WHOLE_NUMBERS else FLOATS_LIMIT)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First address and number of bytes between the first and the last element, both included."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def _entry(tensor: torch.Tensor) -> Known | None:
    base = tensor.data_ptr() - int(tensor.storage_offset()) * tensor.element_size()
    entry = _known.get(base)
    if entry is not None and not entry.alive():
        del _known[base]
        return None
    return entry


def find(tensor: torch.Tensor) -> Known | None:
    """The entry that vouches for every element of ``tensor`` on a dry device; ``None``: its values are not known."""
    entry = _entry(tensor)
    if entry is None or entry.whole or driver.is_known(*_extent(tensor)):
        return entry
    return None


def find_address(address: int) -> Known | None:
    """The entry of the storage that holds ``address``, for reads that no operator announced."""
    for entry in list(_known.values()):
        if entry.base <= address < entry.base + entry.size and entry.alive():
            return entry
    return None


def learn(tensor: torch.Tensor, guess: str = "") -> None:
    """The elements of ``tensor`` now hold what the program would find there (or a ``guess`` of it)."""
    if tensor.numel() == 0 or (tensor.dtype not in WHOLE_NUMBERS and torch_private.in_backward_pass()):
        return  # a gradient: see _known
    address, size = _extent(tensor)
    entry = _entry(tensor)
    if entry is None:
        if len(_known) % _PRUNE_EVERY == _PRUNE_EVERY - 1:
            prune()
        entry = Known(tensor.untyped_storage())
        _known[entry.base] = entry
        if (address, size) != (entry.base, entry.size):
            _unmark_around(entry, address, size)
    if (address, size) == (entry.base, entry.size):
        entry.whole, entry.guess = True, guess
    else:
        entry.guess = entry.guess or guess
    driver.mark_known(address, size)


def _unmark_around(entry: Known, address: int, size: int) -> None:
    """Marks that an earlier owner of these addresses left must not vouch for the rest of a new storage."""
    written = ctypes.string_at(address, size)
    driver.mark_known(entry.base, entry.size, known=False)
    ctypes.memmove(address, written, size)


def forget(tensor: torch.Tensor) -> None:
    """A kernel wrote unknown values into ``tensor``: no longer believe them."""
    entry = _entry(tensor)
    if entry is not None and tensor.numel():
        entry.whole = False
        driver.mark_known(*_extent(tensor), known=False)


def prune() -> None:
    """Drop the entries of storages that are gone."""
    for key in [key for key, entry in _known.items() if not entry.alive()]:
        del _known[key]


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the very memory of ``tensor``: same shape and strides, no copy."""
    if tensor.device.type != "cuda":
        return tensor
    address, size = _extent(tensor)
    if size == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    memory = (ctypes.c_ubyte * size).from_address(address)
    flat = torch.frombuffer(memory, dtype=tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride())


def vouch(values: Iterable[Any]) -> tuple[bool, str]:
    """Are all tensors among ``values`` (lists included) known, and if so, on what guess do they rest?"""
    guess = ""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.device.type != "cuda" or value.numel() == 0:
                continue
            entry = find(value)
            if entry is None:
                return False, ""
            guess = guess or entry.guess
        elif isinstance(value, list | tuple):
            known, inner = vouch(value)
            if not known:
                return False, ""
            guess = guess or inner
    return True, guess
