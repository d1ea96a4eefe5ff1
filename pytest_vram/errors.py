"""Every error of the package. Each carries its numbers as fields and the remedy in its message."""

from __future__ import annotations


class VramError(Exception):
    """Base of every error that pytest_vram raises.

    Attributes:
        judged: the error is a verdict on a whole test, so that its message says all and its traceback nothing.
    """

    judged = False


class VramUsageError(VramError, ValueError):
    """An argument, option or setting is wrong. The message names the value and the valid choices."""


class VramBudgetExceeded(VramError):
    """A test, or a phase of it, needed more memory than its budget.

    Attributes:
        limit_bytes: what the budget allowed.
        peak_bytes: what was needed, in the budget's metric.
        over_bytes: ``peak_bytes - limit_bytes``.
        phase: name of the phase that broke its budget, ``None`` for the whole test.
    """

    def __init__(self, message: str, *, limit_bytes: int, peak_bytes: int, phase: str | None = None) -> None:
        super().__init__(message)
        self.limit_bytes = limit_bytes
        self.peak_bytes = peak_bytes
        self.over_bytes = peak_bytes - limit_bytes
        self.phase = phase


class VramLeak(VramError):
    """A test left more memory behind than ``max_leak_mb`` allows."""

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
    """A test's peak grew past its baseline by more than the tolerance."""

    def __init__(self, message: str, *, baseline_bytes: int, peak_bytes: int, tolerance_percent: float) -> None:
        super().__init__(message)
        self.baseline_bytes = baseline_bytes
        self.peak_bytes = peak_bytes
        self.tolerance_percent = tolerance_percent


class VramUnmeasured(VramError):
    """A budgeted test could not be measured, and the session says that this is a failure."""


class ProbeUnavailable(VramError):
    """The requested probe cannot work on this machine; the message says why and what would."""


class DryGpuError(VramError):
    """The dry GPU could not be built or put beneath torch; the message says why and what would."""
