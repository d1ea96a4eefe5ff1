"""Handles Ctrl-C and SIGTERM: the first signal stops a run between two steps or files, the second one at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from finetune import launch
from finetune.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from torch import nn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequested(BaseException):
    """Raised to abandon the work after a signal. It is a ``BaseException``, so that libraries do not catch it."""


class Stop:
    """Handles the signals that ask this run to stop.

    Outside :meth:`deferred` there is nothing to save, and a signal raises :class:`StopRequested` immediately. Inside,
    the signal is remembered until :meth:`check`. A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferring = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        """Handle the signals in this block. Do nothing outside the main thread, where Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self, first_module: nn.Module) -> Iterator[None]:
        """Remember signals in this block; check for them when ``first_module`` runs, at each micro-batch's start.

        Several ranks check only between two steps, where they agree on whether to stop. If one rank stopped within a
        step, the others would wait for it.
        """
        alone = launch.size() == 1
        hook = first_module.register_forward_pre_hook(lambda *_: self.check() if alone else None)
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
            hook.remove()

    def check(self) -> None:
        """Raise :class:`StopRequested` if a signal came."""
        if self.requested:
            raise StopRequested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(ExitCode.INTERRUPTED)  # every file on the disk is complete
        self.requested = True
        if not self._deferring:
            raise StopRequested
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if launch.is_first():
            print(f"\n{name}: saving the finished steps. Once more stops at once.", file=sys.stderr, flush=True)
