"""Copies between a card and host memory that run beside the card's work, from and to buffers that stay pinned."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Protocol

import torch

from finetune.disk import host_memory
from pytest_vram.drygpu import is_active

if TYPE_CHECKING:
    from torch import Tensor

_PAGE = 4096


class Copies(Protocol):
    """Copies in the order in which they are started, beside the work of the current stream."""

    def allocate(self, size: int) -> Tensor:
        """Return host memory for copies, [size] bytes.

        Raises:
            RuntimeError: there is not so much, or it cannot be pinned.
        """

    def free(self, buffers: list[Tensor]) -> None:
        """Give host memory back, after all copies are done."""

    def start(self, target: Tensor, source: Tensor) -> Any:
        """Start a copy that follows all earlier copies and the work so far, and return a mark to wait for it with."""

    def wait(self, mark: Any) -> None:
        """Let the work that follows wait for a copy. The host does not wait."""


class CardCopies:
    """Copies on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def allocate(self, size: int) -> Tensor:
        """Return pinned host memory, [size] bytes.

        The memory is registered here, because PyTorch's own pinned memory is rounded up to a power of two and is never
        given back to the system.

        Raises:
            RuntimeError: there is not so much, or it cannot be pinned.
        """
        require_room(size)
        pages = -(-size // _PAGE) * _PAGE
        memory = torch.empty(pages + _PAGE, dtype=torch.uint8)
        begin = -memory.data_ptr() % _PAGE
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr() + begin, pages, 0))
        return memory[begin : begin + size]

    def free(self, buffers: list[Tensor]) -> None:
        """Give pinned memory back, after all copies are done. The host waits for them."""
        if not buffers:
            return
        self._stream.synchronize()
        for buffer in buffers:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr()))

    def start(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        """Start a copy that follows all earlier copies and the work so far of the current stream."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            mark: torch.cuda.Event = self._stream.record_event()
            return mark

    def wait(self, mark: torch.cuda.Event) -> None:
        """Let the current stream wait for a copy."""
        torch.cuda.current_stream(self._device).wait_event(mark)


class PlainCopies:
    """Copies that are done when they return: those of a CPU, whose tensors are in host memory already."""

    def allocate(self, size: int) -> Tensor:
        """Return host memory, [size] bytes."""
        return torch.empty(size, dtype=torch.uint8)

    def free(self, buffers: list[Tensor]) -> None:
        """Do nothing: the memory goes when nothing refers to it."""

    def start(self, target: Tensor, source: Tensor) -> None:
        """Copy."""
        target.copy_(source)

    def wait(self, mark: None) -> None:
        """Do nothing."""


@functools.cache
def copies_of(device: torch.device) -> Copies:
    """Return the copies between a device and the host, the same at each call."""
    return CardCopies(device) if device.type == "cuda" else PlainCopies()


def has_room(size: int) -> bool:
    """Return whether ``size`` bytes may be pinned. Pinned memory is never swapped out, so a twentieth stays free.

    A dry GPU stands for another machine, and nothing is written to what is pinned there, so it may have any size.
    """
    return is_active() or size <= host_memory.pinnable_bytes()


def require_room(size: int) -> None:
    """Refuse to pin memory that the machine needs.

    Raises:
        RuntimeError: less than a twentieth of the host's memory would be left.
    """
    if not has_room(size):
        raise RuntimeError(f"the host has {host_memory.available_bytes():,} bytes left")
