"""The work that a program gives to a device: kernels, copies, fills, and the times that the host waits."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work that a program gave to one device in an interval.

    A call of cuBLAS, cuDNN, cuSOLVER or NCCL counts as one kernel, although a card may need several for it. A CUDA
    graph counts with everything that it contains, each time that it is launched. Kernels that read or write managed
    memory move pages, and no figure here includes them.

    Attributes:
        launches: kernels that were launched.
        graph_launches: CUDA graphs that were launched.
        fills: ``cudaMemset`` calls.
        copies_to_device: copies from host memory to the device.
        copied_to_device_bytes: bytes of these.
        copies_to_host: copies from the device to host memory.
        copied_to_host_bytes: bytes of these.
        copies_on_device: copies within a device or between two devices.
        copied_on_device_bytes: bytes of these.
        synchronizations: how often the host waited for the device: for a stream, an event, the whole device, or a
            copy that returns only when it is done.
    """

    launches: int = 0
    graph_launches: int = 0
    fills: int = 0
    copies_to_device: int = 0
    copied_to_device_bytes: int = 0
    copies_to_host: int = 0
    copied_to_host_bytes: int = 0
    copies_on_device: int = 0
    copied_on_device_bytes: int = 0
    synchronizations: int = 0

    def __add__(self, other: Work) -> Work:
        return self._with(other, 1)

    def __sub__(self, earlier: Work) -> Work:
        return self._with(earlier, -1)

    def _with(self, other: Work, sign: int) -> Work:
        return Work(**{f.name: getattr(self, f.name) + sign * getattr(other, f.name) for f in fields(self)})
