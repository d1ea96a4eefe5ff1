"""How many bytes of a figure depend on how far a card's streams lag behind the program.

A tensor that another stream uses (``Tensor.record_stream``) is not free for reuse when the program frees it, but when
that stream has come so far. A dry GPU makes up the time that this takes (``native/clock.c``), and a card's streams may
be slower or faster. The least follows if none of them lags and each block is reused at once. The most follows from two
rules of CUDA. No stream lags when the host has just waited for the device. And the host cannot be more than a
launch queue ahead: launching blocks when the queue is full.

Records that C++ code makes (NCCL's collectives, autograd for gradients that cross streams) are not seen here.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from pytest_vram.drygpu import driver, notes
from pytest_vram.drygpu.values import kernels
from pytest_vram.memory import shared_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

LAUNCH_QUEUE = 1024
"""Kernels that CUDA queues before a launch waits, as in ``native/clock.c``. It is generally known; NVIDIA does not
promise it, and it was not measured."""


class Lag:
    """The blocks of one device that may still be in use by another stream, were this a card."""

    def __init__(self) -> None:
        self._blocks: deque[tuple[int, int]] = deque()
        self._waits = 0
        self._held = 0
        self.most = 0

    def add(self, size: int, *, launches: int, waits: int) -> None:
        """Count a block of ``size`` bytes, when so many kernels were launched and the host waited so many times."""
        if waits != self._waits:
            self._blocks.clear()
            self._held, self._waits = 0, waits
        while self._blocks and self._blocks[0][0] < launches - LAUNCH_QUEUE:
            self._held -= self._blocks.popleft()[1]
        self._blocks.append((launches, size))
        self._held += size
        self.most = max(self.most, self._held)


_lags: dict[int, Lag] = {}
_lock = threading.Lock()


def install(library: torch.library.Library) -> None:
    """Watch ``Tensor.record_stream`` from now on; ``library`` is a fragment of the namespace ``aten``."""
    kernels.put_in_front(library, torch.ops.aten.record_stream.default, _watched)


def _watched(call: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(keyset: Any, tensor: torch.Tensor, stream: Any) -> Any:
        device = tensor.device.index
        work = driver.work(device)
        with _lock:
            lag = _lags.setdefault(device, Lag())
            lag.add(tensor.untyped_storage().nbytes(), launches=work.launches, waits=work.synchronizations)
            most = max(found.most for found in _lags.values())
        notes.assume(shared_blocks.NAME, shared_blocks.text(most), size=most, latest=True)
        return call(keyset, tensor, stream)

    return kernel
