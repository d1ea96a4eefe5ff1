"""The objects that the fixtures ``gpu`` and ``vram`` give a test."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram import units
from pytest_vram.errors import VramUsageError
from pytest_vram.memory.scaling import Scaling, fit
from pytest_vram.plugin.markers import limit_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch

    from pytest_vram.memory import Device, Kind
    from pytest_vram.plugin.figures import PhasePeak
    from pytest_vram.plugin.meter import Meter


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """The device to put tensors on.

    Attributes:
        kind: how its memory is measured: ``cuda``, ``dry``, ``host``, ...
        device: the device for ``tensor.to(gpu.device)``; the CPU for the kind ``host``.
        name: the name of the card.
        total_bytes: its memory; ``None`` where unknown.
        capability: its compute capability; ``None`` where there is none.
        computes: whether the device computes values. A dry GPU allocates, but computes nothing.
    """

    kind: Kind
    device: torch.device
    name: str
    total_bytes: int | None
    capability: tuple[int, int] | None
    computes: bool

    @classmethod
    def of(cls, device: Device) -> Gpu:
        """Make the test's view of a probe's device."""
        import torch

        where = {"host": "cpu", "accelerator": "accelerator"}.get(device.kind, "cuda")
        if where == "accelerator":
            where = torch.accelerator.current_accelerator().type  # type: ignore[union-attr]  # this device is one
        return cls(
            kind=device.kind,
            device=torch.device(where) if where == "cpu" else torch.device(where, device.index),
            name=device.name,
            total_bytes=device.total_bytes,
            capability=device.capability,
            computes=device.kind != "dry",
        )

    def require_values(self) -> None:
        """Skip the test here if the device computes nothing."""
        if not self.computes:
            pytest.skip(f"needs values computed on the device, and {self.name} is a dry GPU")


class Vram:
    """Measures phases of a test."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    @contextlib.contextmanager
    def measure(self, name: str, *, max_gb: float | None = None, max_mb: float | None = None) -> Iterator[None]:
        """Measure a phase; phases may be nested, and a name may be used again.

        Args:
            name: the phase's name, for ``vram[name]`` and the report.
            max_gb: the phase's budget in GB (2**30 bytes), in the metric of the test's budget (allocated without one).
            max_mb: the same in MB (2**20 bytes).

        Raises:
            VramBudgetExceeded: if the phase's peak is above its budget; it is raised when the phase ends.
            VramUsageError: if both limits are given, or a limit is not a positive finite number.
        """
        if max_gb is not None and max_mb is not None:
            raise VramUsageError("vram.measure(max_gb=..., max_mb=...) gives two limits: use one of them")
        limit = None
        if max_gb is not None:
            limit = limit_bytes("max_gb", max_gb, unit=units.GIB)
        elif max_mb is not None:
            limit = limit_bytes("max_mb", max_mb, unit=units.MIB)
        with self._meter.phase(name, limit):
            yield

    def __getitem__(self, name: str) -> PhasePeak:
        """Return the peak and work of a finished phase; if several have this name, of the one with the largest peak.

        Raises:
            VramUsageError: if no phase of this name was measured.
        """
        found = self._meter.phase_peaks(name)
        if not found:
            raise VramUsageError(
                f"no phase {name!r} was measured; there are: {', '.join(self._meter.phase_names()) or 'none'}"
            )
        return max(found, key=lambda peak: peak.allocated or 0)

    @property
    def peak(self) -> PhasePeak:
        """The test's peak so far, fixtures included."""
        return self._meter.peak_so_far()

    def compare(self, **variants: Callable[[], Any]) -> Mapping[str, PhasePeak]:
        """Run each function as a phase of its name, from a clean start, and return the peaks.

        An example is ``vram.compare(plain=step, checkpointed=checkpointed_step)``; ``.added`` of each peak is what the
        function needed by itself.
        """
        if not variants:
            raise VramUsageError("vram.compare() needs functions to compare: vram.compare(before=f, after=g)")
        for name, run in variants.items():
            self._meter.clean()
            with self.measure(name):
                run()
        return {name: self[name] for name in variants}

    def scaling(self, argument: str, values: Sequence[float], run: Callable[..., Any] | None = None) -> Scaling:
        """Return how the peak grows with an argument.

        An example is ``assert vram.scaling("seq", [256, 512, 1024, 2048], step).order <= 1.1``.

        Args:
            argument: the name of the argument.
            values: at least three different sizes.
            run: the function that is called as ``run(argument=value)`` for each value, from a clean start. Without it,
                the figures come from phases named ``"argument=value"``, which the test has to measure beforehand.

        Raises:
            VramUsageError: if there are fewer than three different sizes.
        """
        if len(set(values)) < 3:
            raise VramUsageError(f"vram.scaling({argument!r}, {list(values)!r}) needs at least three different sizes")
        for value in values if run is not None else ():
            self._meter.clean()
            with self.measure(f"{argument}={value}"):
                run(**{argument: value})  # type: ignore[misc]  # the name of the argument is a value
        peaks = [self[f"{argument}={value}"].added or 0 for value in values]
        return fit(argument, values, peaks)
