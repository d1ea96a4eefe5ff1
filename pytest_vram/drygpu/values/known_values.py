"""Remember which tensors of a dry GPU have known values, and give CPU views of them.

Kernels of a dry GPU compute nothing. But the values that the program copied or filled are known, and so are those that
``carry.py`` computes from them on the CPU. The stub library marks the addresses that were written, in grains of 512
bytes. Since the caching allocator uses addresses again, a mark alone is not enough: a value is known only if its
storage is listed here as well. The list holds weak references, so it never keeps memory alive and never changes a
figure.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

import torch

from pytest_vram import torch_private
from pytest_vram.drygpu import driver
from pytest_vram.units import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

WHOLE_NUMBERS = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
"""Types whose values decide branches and sizes. Tensors of these types are carried up to ``WHOLE_NUMBERS_LIMIT``."""

WHOLE_NUMBERS_LIMIT = 16 * MIB
"""The largest tensor of whole numbers that is carried, in bytes. A one-hot routing of 2048 tokens to 8 of 128 experts
takes 16 MiB."""

FLOATS_LIMIT = KIB
"""The largest tensor of floats that is carried, in bytes: scales, loss weights and counters, but not parameters."""

_PRUNE_EVERY = 4096
_release = torch_private.release_weak_storage()


class Known:
    """A storage with known bytes.

    Attributes:
        base: address of the storage's first byte.
        size: size of the storage in bytes.
        whole: whether every byte is known.
        part: which bytes are known, a 1 for each, if some are and some may not be; None if the storage is larger than
            ``WHOLE_NUMBERS_LIMIT``. Then the marks of the stub library tell, which are less exact.
        guess: the assumption that the values rest on; ``""`` if they are the program's own.
        expected: values that another rank sends, fetched before anybody reads the tensor: see :func:`expect`.
    """

    __slots__ = ("_weak", "base", "expected", "guess", "part", "size", "whole")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._weak = torch_private.weak_storage(storage)
        self.base = storage.data_ptr()
        self.size = storage.nbytes()
        self.whole = False
        self.part: bytearray | None = None
        self.guess = ""
        self.expected: list[Callable[[], None]] = []

    def __del__(self, free: Callable[[Any], Any] = _release) -> None:
        free(self._weak)  # a default argument outlives the module's own names when the interpreter shuts down

    def storage(self) -> torch.UntypedStorage | None:
        """Return the storage; None if it no longer exists, or no longer has the same memory."""
        found = torch_private.strong_storage(self._weak)
        return found if found is not None and found.data_ptr() == self.base else None

    def alive(self) -> bool:
        """Return whether the storage still exists, with the same memory."""
        return self.storage() is not None

    def knows(self, address: int, size: int) -> bool:
        """Return whether the bytes from ``address`` on are known, as far as the storage has a list of them."""
        begin = address - self.base
        return self.part is None or self.part.count(1, begin, begin + size) == min(size, self.size - begin)


_known: dict[int, Known] = {}
"""Known storages by address. Looking a tensor up must not create a Python object for its storage, because autograd
counts references to decide whether it may add a gradient in place."""


def is_carried(tensor: torch.Tensor) -> bool:
    """Return whether tensors of this type and size are carried."""
    size = tensor.numel() * tensor.element_size()
    return size <= (WHOLE_NUMBERS_LIMIT if tensor.dtype in WHOLE_NUMBERS else FLOATS_LIMIT)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the address of the first element, and the bytes from it to the end of the last element."""
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
    if entry is not None and entry.expected:
        _fetch(entry)
    return entry


def _fetch(entry: Known) -> None:
    expected, entry.expected = entry.expected, []
    for put in expected:
        put()


def expect(tensor: torch.Tensor, fetch: Callable[[], tuple[bytes | None, str]]) -> None:
    """Arrange for the elements of ``tensor`` to be fetched from another rank when they are first read or written.

    Nothing keeps the tensor's memory alive until then.

    Args:
        tensor: a contiguous tensor that receives the elements.
        fetch: waits for the bytes, and returns them with the assumption that they rest on; the bytes are ``None`` if
            they are not known.
    """
    if tensor.numel() == 0:
        return
    forget(tensor)
    entry = _entry(tensor)
    if entry is None:
        entry = _known[tensor.untyped_storage().data_ptr()] = Known(tensor.untyped_storage())
        driver.mark_known(entry.base, entry.size, known=False)
    entry.expected.append(functools.partial(_put, entry, *_extent(tensor), fetch))


def _put(entry: Known, address: int, size: int, fetch: Callable[[], tuple[bytes | None, str]]) -> None:
    data, guess = fetch()
    if data is None or len(data) != size:
        return
    driver.mark_known(address, size)
    ctypes.memmove(address, data, size)
    part = _learned(entry, guess, whole=size == entry.size)
    if part is not None:
        part[address - entry.base : address - entry.base + size] = b"\1" * size


def find(tensor: torch.Tensor) -> Known | None:
    """Return the entry of a tensor on a dry GPU if every element is known, and ``None`` otherwise."""
    entry = _entry(tensor)
    if entry is None or entry.whole:
        return entry
    if entry.part is None:
        return entry if driver.is_known(*_extent(tensor)) else None
    return entry if _bytes_of(tensor, entry.part).all() else None


def _learned(entry: Known, guess: str, *, whole: bool) -> bytearray | None:
    """Add values to an entry, of the ``whole`` storage or a part of it. Return the list to mark the part in, if any."""
    if whole:
        entry.whole, entry.part, entry.guess = True, None, guess
        return None
    entry.guess = entry.guess or guess
    return None if entry.whole else _part(entry)


def _part(entry: Known) -> bytearray | None:
    """Return which bytes of a storage are known, to be changed; None if it is too large for a list."""
    if entry.part is None and entry.size <= WHOLE_NUMBERS_LIMIT:
        entry.part = bytearray(b"\1" * entry.size if entry.whole else entry.size)
    return entry.part


def _bytes_of(tensor: torch.Tensor, part: bytearray) -> torch.Tensor:
    """Return the bytes of ``part`` that belong to the elements of ``tensor``: its shape, and one more dimension."""
    width = tensor.element_size()
    strides = [stride * width for stride in tensor.stride()]
    return torch.frombuffer(part, dtype=torch.uint8).as_strided(
        (*tensor.shape, width), (*strides, 1), int(tensor.storage_offset()) * width
    )


def find_address(address: int) -> Known | None:
    """Return the entry of the storage that contains ``address``; used for reads that no operator announced."""
    for entry in list(_known.values()):
        if entry.base <= address < entry.base + entry.size and entry.alive():
            if entry.expected:
                _fetch(entry)
            return entry
    return None


def can_learn(tensor: torch.Tensor) -> bool:
    """Return whether values of this tensor may be listed now: not if it could be a gradient (see ``_known``)."""
    return tensor.dtype in WHOLE_NUMBERS or not torch_private.in_backward_pass()


def learn(tensor: torch.Tensor, guess: str = "") -> None:
    """Mark the elements of ``tensor`` as known: the program's own values, or values that rest on ``guess``."""
    if tensor.numel() == 0 or not can_learn(tensor):
        return
    address, size = _extent(tensor)
    entry = _entry(tensor)
    if entry is None:
        if len(_known) % _PRUNE_EVERY == _PRUNE_EVERY - 1:
            prune()
        entry = Known(tensor.untyped_storage())
        _known[entry.base] = entry
        if (address, size) != (entry.base, entry.size):
            _unmark_around(entry, address, size)
    driver.mark_known(address, size)
    whole = (address, size) == (entry.base, entry.size) and size == tensor.numel() * tensor.element_size()
    part = _learned(entry, guess, whole=whole)
    if part is not None:
        _bytes_of(tensor, part).fill_(1)


def _unmark_around(entry: Known, address: int, size: int) -> None:
    """Clear the marks of a new storage outside of the given range, which an earlier storage may have left."""
    written = ctypes.string_at(address, size)
    driver.mark_known(entry.base, entry.size, known=False)
    ctypes.memmove(address, written, size)


def forget(tensor: torch.Tensor) -> None:
    """Mark the elements of ``tensor`` as unknown, because a kernel wrote to them."""
    entry = _entry(tensor)
    if entry is None or tensor.numel() == 0:
        return
    address, size = _extent(tensor)
    part = None if (address, size) == (entry.base, entry.size) else _part(entry)
    entry.whole = False
    if part is None:
        entry.part = None
        driver.mark_known(address, size, known=False)
    else:  # the stub's marks are too coarse for a part of a storage, and its unknown bytes must be zeros
        _bytes_of(tensor, part).zero_()
        on_cpu(tensor).zero_()


def prune() -> None:
    """Remove the entries of storages that no longer exist."""
    for key in [key for key, entry in _known.items() if not entry.alive()]:
        del _known[key]


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Return a CPU tensor that shares the memory of ``tensor``, with the same shape and strides."""
    if tensor.device.type != "cuda":
        return tensor
    address, size = _extent(tensor)
    if size == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    memory = (ctypes.c_ubyte * size).from_address(address)
    flat = torch.frombuffer(memory, dtype=tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride())


def vouch(values: Iterable[Any]) -> tuple[bool, str]:
    """Return whether all tensors in ``values``, nested lists included, are known, and the first guess they rest on."""
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
