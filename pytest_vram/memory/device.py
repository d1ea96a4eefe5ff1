"""Where memory is: a device, and the software around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["cuda", "dry", "host", "nvml", "accelerator"]
"""How a figure came about: measured on a card, allocator-exact over a stub driver, traced on the CPU, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device whose memory is measured.

    ``total_bytes`` and ``capability`` are ``None`` where nothing reports them.
    """

    kind: Kind
    index: int
    name: str
    uuid: str | None = None
    total_bytes: int | None = None
    capability: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What a report was made with. Versions are ``None`` where the package is absent."""

    python: str
    pytest_vram: str
    torch: str | None = None
    cuda: str | None = None
    driver: str | None = None
    allocator_conf: str | None = None
    devices: tuple[Device, ...] = ()
