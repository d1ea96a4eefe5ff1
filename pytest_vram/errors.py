"""The errors that this package raises. An error keeps its numbers in attributes, and its message names the remedy."""

from __future__ import annotations


class VramError(Exception):
    """Base class of every error that pytest_vram raises.

    Attributes:
        judged: whether the error is the verdict on a whole test. pytest then shows the message without a traceback,
            because no line of the test raised the error.
    """

    judged = False


class VramUsageError(VramError, ValueError):
    """An argument, option or setting is wrong. The message names the value and the valid choices."""


class VramBudgetExceeded(VramError):
    """A test, or a phase of it, needed more memory than its budget.

    Attributes:
        limit_bytes: the largest peak that the budget allows.
        peak_bytes: the peak that was measured, in the budget's metric.
        over_bytes: ``peak_bytes - limit_bytes``.
        phase: name of the phase that broke its budget; ``None`` if the whole test did.
    """

    def __init__(self, message: str, *, limit_bytes: int, peak_bytes: int, phase: str | None = None) -> None:
        super().__init__(message)
        self.limit_bytes = limit_bytes
        self.peak_bytes = peak_bytes
        self.over_bytes = peak_bytes - limit_bytes
        self.phase = phase


class VramLeak(VramError):
    """A test left more memory allocated than ``max_leak_mb`` allows."""

    def __init__(self, message: str, *, limit_bytes: int, leaked_bytes: int) -> None:
        super().__init__(message)
        self.limit_bytes = limit_bytes
        self.leaked_bytes = leaked_bytes


class VramRankFailed(VramError):
    """A rank of a test with ``vram_ranks`` failed, or did not end in time.

    Attributes:
        rank: the one that failed first.
    """

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class VramRegression(VramError):
    """A test's peak is above its baseline by more than the tolerance."""

    def __init__(self, message: str, *, baseline_bytes: int, peak_bytes: int, tolerance_percent: float) -> None:
        super().__init__(message)
        self.baseline_bytes = baseline_bytes
        self.peak_bytes = peak_bytes
        self.tolerance_percent = tolerance_percent


class VramUnmeasured(VramError):
    """A test with a budget could not be measured, and the session is set to fail such tests."""


class ProbeUnavailable(VramError):
    """The requested probe cannot work on this machine. The message says why, and what to do."""


class DryGpuError(VramError):
    """The dry GPU could not be built, or torch cannot use it. The message says why, and what to do."""
