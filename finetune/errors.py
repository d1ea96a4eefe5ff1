"""Errors that a user can act on. Each names the field, the value and the remedy, and knows its exit code."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """What ``python -m finetune.qlora`` exits with."""

    OK = 0
    BUG = 1
    USAGE = 2
    OUT_OF_MEMORY = 3
    CANNOT_WRITE = 4
    NO_LEARNING = 5
    INTERRUPTED = 130

    @property
    def meaning(self) -> str:
        """One line for ``--help``."""
        return _MEANINGS[self]


_MEANINGS = {
    ExitCode.OK: "the adapter is written",
    ExitCode.BUG: "a bug in this program, with its traceback; what was saved is sound",
    ExitCode.USAGE: "a flag, YAML value, data row, model or output folder cannot be used; the message says what would",
    ExitCode.OUT_OF_MEMORY: "out of memory, on the GPU or on the host; what was saved is sound, go on with --resume",
    ExitCode.CANNOT_WRITE: "the disk is full or not writable; what was saved is sound, go on with --resume",
    ExitCode.NO_LEARNING: "the loss is not a number, or no gradient reaches the adapter; the message says why",
    ExitCode.INTERRUPTED: "Ctrl-C or SIGTERM; the finished steps are saved, go on with --resume",
}


class FinetuneError(Exception):
    """Base of every error that finetune raises for its user."""

    exit_code = ExitCode.USAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One setting that cannot be used."""

    field: str
    """Name of the setting, as in the YAML file; the flag is the same with dashes."""
    value: object
    """What was given."""
    why: str
    """What is wrong with it."""
    remedy: str
    """What would work."""

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.why}; {self.remedy}"


class ConfigError(FinetuneError, ValueError):
    """One or more settings cannot be used. ``problems`` holds each."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class ModelError(FinetuneError):
    """The base model cannot be loaded, or not as configured."""


class MissingModelError(ModelError):
    """There is no model of that name, in no folder and not on the hub."""


class DataError(FinetuneError):
    """A row, a file or a data set cannot be used."""


class TrainingError(FinetuneError):
    """Training would go on without meaning: no gradient reaches the adapter, or the loss is not a number."""

    exit_code = ExitCode.NO_LEARNING


class CheckpointError(FinetuneError):
    """A checkpoint is damaged or belongs to another run."""


class OutputError(FinetuneError):
    """The output folder is taken, locked or not writable."""


class WriteError(FinetuneError):
    """The disk is full or refuses to be written, in the middle of a run."""

    exit_code = ExitCode.CANNOT_WRITE


class OutOfMemoryError(FinetuneError):
    """Device or host memory ran out.

    Attributes:
        budget_bytes: what there was.
        held_bytes: what this process held when it failed.
        savings: the settings that would save most, as (setting, bytes saved).
    """

    exit_code = ExitCode.OUT_OF_MEMORY

    def __init__(
        self, message: str, *, budget_bytes: int | None, held_bytes: int, savings: tuple[tuple[str, int], ...] = ()
    ) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.held_bytes = held_bytes
        self.savings = savings


class RunInterruptedError(FinetuneError):
    """Ctrl-C or SIGTERM arrived, and the finished steps are saved."""

    exit_code = ExitCode.INTERRUPTED
