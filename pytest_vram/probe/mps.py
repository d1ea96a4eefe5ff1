"""A probe for Apple's GPUs. PyTorch counts what they hold and keeps no peak, so it is sampled after every operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_vram.memory import Device, Note, Peak
from pytest_vram.probe.base import PlainProbe

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_vram.memory import Kind

BETWEEN = Note(
    name="MPS peaks",
    text="are the largest of samples after each operator: memory that an operator takes and frees itself is not seen",
    source="recorder",
)


class _AfterEachOperator(TorchDispatchMode):
    """Calls ``sample`` after each operator of the thread, and after those of its backward passes."""

    def __init__(self, sample: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotations here
        self._sample = sample

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._sample()
        return result


class MpsProbe(PlainProbe):
    """Reads ``torch.mps``: bytes in live tensors, and all that the Metal driver holds for this process."""

    kind: Kind = "accelerator"

    def __init__(self) -> None:
        self._allocated = self._driver = 0
        self._mode: _AfterEachOperator | None = None

    def devices(self) -> tuple[Device, ...]:
        """Return the GPU as one device, whose memory is what Metal recommends a process to use at most."""
        return (Device(kind="accelerator", index=0, name="mps", total_bytes=torch.mps.recommended_max_memory()),)

    def allocated(self) -> tuple[int, ...]:
        """Return the bytes in live tensors, without the allocator's cache."""
        return (torch.mps.current_allocated_memory(),)

    def peak(self) -> tuple[Peak, ...]:
        """Take a sample, and return the largest since the last reset. There is no figure of reserved bytes."""
        self._sample()
        return (Peak(allocated_bytes=self._allocated, device_bytes=self._driver),)

    def reset_peak(self) -> None:
        """Set the peaks to what is held now."""
        self._allocated = self._driver = 0
        self._sample()

    def free_bytes(self, index: int) -> int | None:
        """Return how far the process is below the memory that Metal recommends."""
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())

    def begin_test(self, *, record: bool, timeline: bool = False) -> None:
        """Take a sample after every operator from now on. Nothing else is recorded."""
        if self._mode is None:
            self._mode = _AfterEachOperator(self._sample)
            self._mode.__enter__()  # type: ignore[no-untyped-call]  # torch has no annotations here

    def end_test(self) -> None:
        """Take no more samples after operators."""
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch has no annotations here
            self._mode = None

    def notes(self) -> tuple[Note, ...]:
        """Return the note that the peaks are samples."""
        return (BETWEEN,)

    def release(self) -> None:
        """Empty the allocator's cache."""
        torch.mps.empty_cache()

    def _sample(self) -> None:
        self._allocated = max(self._allocated, torch.mps.current_allocated_memory())
        self._driver = max(self._driver, torch.mps.driver_allocated_memory())
