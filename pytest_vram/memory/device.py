"""A device whose memory is measured, and the software that a report was made with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["cuda", "dry", "host", "nvml", "accelerator"]
"""Which probe measured: ``cuda`` on a real card, ``dry`` on a dry GPU, ``host`` for CPU tensors, ``nvml`` by sampling
NVML, ``accelerator`` for XPU and other devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device whose memory is measured.

    ``total_bytes`` and ``capability`` are ``None`` if nothing reports them.
    """

    kind: Kind
    index: int
    name: str
    uuid: str | None = None
    total_bytes: int | None = None
    capability: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The versions and devices that a report was made with. A version is ``None`` if the package is not installed."""

    python: str
    pytest_vram: str
    torch: str | None = None
    cuda: str | None = None
    driver: str | None = None
    allocator_conf: str | None = None
    devices: tuple[Device, ...] = ()
