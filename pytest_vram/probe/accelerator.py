"""A probe for XPU and the other devices, besides CUDA, whose memory counters ``torch.accelerator`` reads."""

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
        """Return every device of the current accelerator."""
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
        """Return the bytes in live blocks of each device."""
        return tuple(torch.accelerator.memory_allocated(index) for index in range(self._count))

    def peak(self) -> tuple[Peak, ...]:
        """Return the allocated and reserved peaks since the last reset."""
        return tuple(
            Peak(
                allocated_bytes=torch.accelerator.max_memory_allocated(index),
                reserved_bytes=torch.accelerator.max_memory_reserved(index),
            )
            for index in range(self._count)
        )

    def reset_peak(self) -> None:
        """Set the peaks to what is allocated now."""
        for index in range(self._count):
            torch.accelerator.reset_peak_memory_stats(index)

    def counters(self) -> tuple[Counters, ...]:
        """Return retries and OutOfMemory errors; 0 for a device that does not count them."""
        found = []
        for index in range(self._count):
            stats = torch.accelerator.memory_stats(index)
            found.append(Counters(retries=int(stats.get("num_alloc_retries", 0)), ooms=int(stats.get("num_ooms", 0))))
        return tuple(found)

    def free_bytes(self, index: int) -> int | None:
        """Return the free memory of the device in bytes."""
        return int(torch.accelerator.get_memory_info(index)[0])

    def release(self) -> None:
        """Empty the allocator's cache."""
        torch.accelerator.empty_cache()
