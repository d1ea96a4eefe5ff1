"""Records a trial while its steps run: the memory at each moment, the lines of code that held it, and the phases."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from finetune.dryrun.messages import Recording
from pytest_vram.memory import Peak, Phase
from pytest_vram.memory.timeline import CATEGORIES

if TYPE_CHECKING:
    from torch import nn

    from pytest_vram.memory import Timeline

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

    def meet(self, model: nn.Module) -> None:
        """Tell the recorder which tensors belong to a model, before the model is called."""
        self._recorder.meet(model)

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


class StepRecorder:
    """Records one step of ``model`` on the current device, to tell what the bytes at its peak are for.

    A history that is being recorded already goes on; only its events from now on count.
    """

    def __init__(self, model: nn.Module) -> None:
        from pytest_vram.probe.history import History
        from pytest_vram.probe.recorder import Recorder

        self._model = model
        self._history, self._recorder = History(), Recorder()

    def __enter__(self) -> Self:
        self._history.start()
        self._recorder.start()
        # The loss reads the head's weight without calling the model that the head is part of.
        self._recorder.meet(self._model)
        return self

    def __exit__(self, *_: object) -> None:
        self._recorder.stop()
        self._history.stop()

    def at_peak(self, peak_bytes: int) -> dict[str, int]:
        """Return the bytes at the recorded peak by category; see :func:`by_category`."""
        import torch

        return by_category(self._recorder.timeline(torch.cuda.current_device()), peak_bytes)


def by_category(timeline: Timeline, peak_bytes: int) -> dict[str, int]:
    """Return the bytes at the peak of a timeline for each of ``CATEGORIES``, in their order.

    Args:
        timeline: the timeline of one step.
        peak_bytes: the allocator's own peak. Bytes of it that the timeline lacks count as ``other``: if a step has more
            events than the history has room for, the oldest ones are lost.
    """
    found = timeline.at_peak()
    sizes: dict[str, int] = {name: found.get(name, 0) for name in CATEGORIES}
    sizes["other"] += max(0, peak_bytes - sum(sizes.values()))
    return sizes
