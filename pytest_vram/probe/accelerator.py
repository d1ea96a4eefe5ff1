"""A probe for XPU and the other devices, besides CUDA and MPS, whose memory PyTorch counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_vram.errors import ProbeUnavailable
from pytest_vram.memory import Device, Peak
from pytest_vram.probe.base import PlainProbe
from pytest_vram.probe.protocol import Counters

if TYPE_CHECKING:
    from pytest_vram.memory import Kind

_NEEDED = ("memory_allocated", "max_memory_allocated", "max_memory_reserved", "reset_peak_memory_stats", "memory_stats")


class AcceleratorProbe(PlainProbe):
    """Reads the memory statistics of ``torch.accelerator``, or of the device's own module, such as ``torch.xpu``.

    ``torch.accelerator`` counts memory from torch 2.9 on; before that the device's module has the same functions.

    Raises:
        ProbeUnavailable: PyTorch has no memory counters for this kind of device.
    """

    kind: Kind = "accelerator"

    def __init__(self) -> None:
        accelerator = torch.accelerator.current_accelerator()
        self._type = accelerator.type if accelerator is not None else "none"
        self._count = torch.accelerator.device_count()
        self._own: Any = getattr(torch, self._type, None)
        self._memory: Any = next(
            (module for module in (torch.accelerator, self._own) if all(hasattr(module, name) for name in _NEEDED)),
            None,
        )
        if self._memory is None:
            raise ProbeUnavailable(
                f"torch {torch.__version__} counts no memory of {self._type} devices: write a probe of your own"
                " (docs/how-to/probe.md), or measure CPU tensors with --vram-gpu=host"
            )

    def devices(self) -> tuple[Device, ...]:
        """Return every device of the current accelerator."""
        return tuple(
            Device(kind="accelerator", index=index, name=self._name(index), total_bytes=self._info(index)[1])
            for index in range(self._count)
        )

    def allocated(self) -> tuple[int, ...]:
        """Return the bytes in live blocks of each device."""
        return tuple(int(self._memory.memory_allocated(index)) for index in range(self._count))

    def peak(self) -> tuple[Peak, ...]:
        """Return the allocated and reserved peaks since the last reset."""
        return tuple(
            Peak(
                allocated_bytes=int(self._memory.max_memory_allocated(index)),
                reserved_bytes=int(self._memory.max_memory_reserved(index)),
            )
            for index in range(self._count)
        )

    def reset_peak(self) -> None:
        """Set the peaks to what is allocated now."""
        for index in range(self._count):
            self._memory.reset_peak_memory_stats(index)

    def counters(self) -> tuple[Counters, ...]:
        """Return retries and OutOfMemory errors; 0 for a device that does not count them."""
        found = []
        for index in range(self._count):
            stats = self._memory.memory_stats(index)
            found.append(Counters(retries=int(stats.get("num_alloc_retries", 0)), ooms=int(stats.get("num_ooms", 0))))
        return tuple(found)

    def free_bytes(self, index: int) -> int | None:
        """Return the free memory of the device in bytes; None if the device does not tell."""
        return self._info(index)[0]

    def release(self) -> None:
        """Empty the allocator's cache."""
        for module in (self._memory, self._own):
            if hasattr(module, "empty_cache"):
                module.empty_cache()
                return

    def _info(self, index: int) -> tuple[int | None, int | None]:
        """Return the free and the total memory; None for both if the device does not tell."""
        for module, name in ((self._memory, "get_memory_info"), (self._own, "mem_get_info")):
            ask = getattr(module, name, None)
            if ask is not None:
                try:
                    free, total = ask(index)
                except RuntimeError:  # some drivers of integrated GPUs refuse to tell how much is free
                    continue
                return int(free), int(total)
        properties = getattr(self._own, "get_device_properties", None)
        total = None if properties is None else getattr(properties(index), "total_memory", None)
        return None, None if total is None else int(total)

    def _name(self, index: int) -> str:
        ask = getattr(self._own, "get_device_name", None)
        return self._type if ask is None else str(ask(index))
