"""Records a trial while its steps run: what was held at each moment, by whom, and in which phase."""

from __future__ import annotations

import time

from finetune.dryrun.messages import Recording
from pytest_vram.memory import Peak, Phase

_MOST_HOLDERS = 30


class TrialRecorder:
    """Records the current device from the moment it is made. It takes host memory, and none of the device's.

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
            name: of the phase; the same name may come again.
            seconds: how long it took.
            peak_bytes: the most bytes that were allocated during it.
        """
        end = time.perf_counter() - self._began
        peak = Peak(allocated_bytes=peak_bytes)
        self.phases.append(Phase(name=name, start=max(0.0, end - seconds), end=end, peak=peak))

    def read(self) -> Recording:
        """Return what was recorded until now. This takes seconds for a model of 7 billion parameters."""
        import torch

        device = torch.cuda.current_device()
        return Recording(
            timeline=self._recorder.timeline(device),
            holders=self._recorder.holders(device, _MOST_HOLDERS),
            phases=tuple(self.phases),
        )
