"""The errors that a user can act on. Each message names the field, the value and the remedy; each has an exit code."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of ``python -m finetune.qlora``."""

    OK = 0
    BUG = 1
    USAGE = 2
    OUT_OF_MEMORY = 3
    CANNOT_WRITE = 4
    NO_LEARNING = 5
    RANK_LOST = 6
    INTERRUPTED = 130

    @property
    def meaning(self) -> str:
        """The explanation of this code, one line for ``--help``."""
        return _MEANINGS[self]


_MEANINGS = {
    ExitCode.OK: "the adapter is written",
    ExitCode.BUG: "a bug in this program, with its traceback; what was saved is sound",
    ExitCode.USAGE: "a flag, YAML value, data row, model or output folder cannot be used; the message gives the remedy",
    ExitCode.OUT_OF_MEMORY: "out of memory, on the GPU or on the host; what was saved is sound, continue with --resume",
    ExitCode.CANNOT_WRITE: "the disk is full or not writable; what was saved is sound, continue with --resume",
    ExitCode.NO_LEARNING: "the loss is not a number, or no gradient reaches the adapter; the message says why",
    ExitCode.RANK_LOST: "another rank is gone without a message; what was saved is sound, continue with --resume",
    ExitCode.INTERRUPTED: "Ctrl-C or SIGTERM; the finished steps are saved, continue with --resume",
}


class FinetuneError(Exception):
    """Base of every error that finetune raises for its user."""

    exit_code = ExitCode.USAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One setting that cannot be used."""

    field: str
    """Name of the setting as the YAML file has it, such as ``micro_batch``; its flag is ``--micro-batch``."""
    value: object
    """The value that was given."""
    why: str
    """Why the value cannot be used."""
    remedy: str
    """A value or an action that would work."""

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.why}; {self.remedy}"


class ConfigError(FinetuneError, ValueError):
    """One or more settings cannot be used; ``problems`` has one entry for each."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class ModelError(FinetuneError):
    """The base model cannot be loaded, or cannot be loaded with these settings."""


class MissingModelError(ModelError):
    """No folder and no hub model has that name."""


class DataError(FinetuneError):
    """A row, a file or a data set cannot be used."""


class TrainingError(FinetuneError):
    """Training would learn nothing: no gradient reaches the adapter, or the loss is not a number."""

    exit_code = ExitCode.NO_LEARNING


class CheckpointError(FinetuneError):
    """A checkpoint is damaged or belongs to another run."""


class OutputError(FinetuneError):
    """The output folder holds another run, is locked by one, or is not writable."""


class WriteError(FinetuneError):
    """A write failed during a run, because the disk is full or not writable."""

    exit_code = ExitCode.CANNOT_WRITE


class OutOfMemoryError(FinetuneError):
    """Device or host memory ran out.

    Attributes:
        budget_bytes: the memory that there was; None where that is unknown.
        held_bytes: the memory that this process held when an allocation failed.
        savings: the settings that would save the most, as (setting, bytes saved).
    """

    exit_code = ExitCode.OUT_OF_MEMORY

    def __init__(
        self, message: str, *, budget_bytes: int | None, held_bytes: int, savings: tuple[tuple[str, int], ...] = ()
    ) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.held_bytes = held_bytes
        self.savings = savings


class RankLostError(FinetuneError):
    """Another rank of the run was killed, or cannot be reached."""

    exit_code = ExitCode.RANK_LOST


class OtherRankError(FinetuneError):
    """Another rank of the run has failed, and has printed its message; this rank ends with the same exit code."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RunInterruptedError(FinetuneError):
    """Ctrl-C or SIGTERM stopped the run; the finished steps are saved."""

    exit_code = ExitCode.INTERRUPTED
