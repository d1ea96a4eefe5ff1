"""A trial over time: what was held at each moment, by whom, and in which phase, recorded while the steps run."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

# At run time: an answer's `Recorded` is decoded by its types.
from pytest_vram.memory import Holder, Peak, Phase, Timeline

_HOLDERS = 30


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What a page of a trial shows beside its figures."""

    timeline: Timeline
    holders: tuple[Holder, ...]
    """The lines that held most at the peak, the largest first."""
    phases: tuple[Phase, ...]
    """In the order in which they ended."""


class OverTime:
    """Records the current device from its making on. It holds host memory for it, and none of the device's.

    Attributes:
        phases: those that have ended, in that order.
    """

    def __init__(self) -> None:
        from pytest_vram.probe.history import History
        from pytest_vram.probe.recorder import Recorder

        self._history, self._recorder = History(), Recorder()
        self.phases: list[Phase] = []
        self._history.start()
        self._began = time.perf_counter()
        self._recorder.start()

    def phase(self, name: str, seconds: float, peak_bytes: int) -> None:
        """Note a phase that ends now.

        Args:
            name: of the phase; it may come again.
            seconds: how long it took.
            peak_bytes: allocated bytes at its peak.
        """
        end = time.perf_counter() - self._began
        peak = Peak(allocated_bytes=peak_bytes)
        self.phases.append(Phase(name=name, start=max(0.0, end - seconds), end=end, peak=peak))

    def read(self) -> dict[str, Any]:
        """A :class:`Recorded` until now, as JSON keeps it. Takes seconds for a model of 7 billion parameters."""
        import torch

        device = torch.cuda.current_device()
        return dataclasses.asdict(
            Recorded(
                timeline=self._recorder.timeline(device),
                holders=self._recorder.holders(device, _HOLDERS),
                phases=tuple(self.phases),
            )
        )
