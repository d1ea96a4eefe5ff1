"""Records a trial while its steps run: the memory at each moment, the lines of code that held it, and the phases."""

from __future__ import annotations

import time

from finetune.dryrun.messages import Recording
from pytest_vram.memory import Peak, Phase

_MOST_HOLDERS = 30


class TrialRecorder:
    """Records the current device from its creation on. It takes host memory, and no memory of the device.

    Attributes:
        phases: the phases that have ended, in that order.
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
        """Record a phase that ends now.

        Args:
            name: name of the phase; several phases may have the same name.
            seconds: how long the phase took.
            peak_bytes: the most bytes that were allocated during the phase.
        """
        end = time.perf_counter() - self._began
        peak = Peak(allocated_bytes=peak_bytes)
        self.phases.append(Phase(name=name, start=max(0.0, end - seconds), end=end, peak=peak))

    def read(self) -> Recording:
        """Return the recording so far. This takes seconds for a model of 7 billion parameters."""
        import torch

        device = torch.cuda.current_device()
        return Recording(
            timeline=self._recorder.timeline(device),
            holders=self._recorder.holders(device, _MOST_HOLDERS),
            phases=tuple(self.phases),
        )
