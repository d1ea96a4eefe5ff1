"""Devices other than CUDA that keep the same counters: XPU and whatever else ``torch.accelerator`` speaks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pytest_vram.memory import Device, Peak
from pytest_vram.probe.base import PlainProbe
from pytest_vram.probe.protocol import Counters

if TYPE_CHECKING:
    from pytest_vram.memory import Kind


class AcceleratorProbe(PlainProbe):
    """Reads ``torch.accelerator``'s memory statistics."""

    kind: Kind = "accelerator"

    def __init__(self) -> None:
        accelerator = torch.accelerator.current_accelerator()
        self._type = accelerator.type if accelerator is not None else "none"
        self._count = torch.accelerator.device_count()

    def devices(self) -> tuple[Device, ...]:
        """Every device of the current accelerator."""
        return tuple(
            Device(
                kind="accelerator",
                index=index,
                name=self._type,
                total_bytes=torch.accelerator.get_memory_info(index)[1],
            )
            for index in range(self._count)
        )

    def allocated(self) -> tuple[int, ...]:
        """Bytes in live blocks."""
        return tuple(torch.accelerator.memory_allocated(index) for index in range(self._count))

    def peak(self) -> tuple[Peak, ...]:
        """Allocated and reserved peaks since the last reset."""
        return tuple(
            Peak(
                allocated_bytes=torch.accelerator.max_memory_allocated(index),
                reserved_bytes=torch.accelerator.max_memory_reserved(index),
            )
            for index in range(self._count)
        )

    def reset_peak(self) -> None:
        """Start the peaks from what is held now."""
        for index in range(self._count):
            torch.accelerator.reset_peak_memory_stats(index)

    def counters(self) -> tuple[Counters, ...]:
        """Retries and OutOfMemory errors, where the device counts them."""
        found = []
        for index in range(self._count):
            stats = torch.accelerator.memory_stats(index)
            found.append(Counters(retries=int(stats.get("num_alloc_retries", 0)), ooms=int(stats.get("num_ooms", 0))))
        return tuple(found)

    def free_bytes(self, index: int) -> int | None:
        """What the device has left."""
        return int(torch.accelerator.get_memory_info(index)[0])

    def release(self) -> None:
        """Empty the allocator's cache."""
        torch.accelerator.empty_cache()
