"""The exit code of every failure, on which scripts depend, and messages that name field, value and remedy."""

from __future__ import annotations

import pytest

from finetune import errors
from finetune.errors import ConfigError, ExitCode, FinetuneError, OutOfMemoryError, Problem

CODES = {
    "ConfigError": 2,
    "ModelError": 2,
    "MissingModelError": 2,
    "DataError": 2,
    "CheckpointError": 2,
    "OutputError": 2,
    "OutOfMemoryError": 3,
    "WriteError": 4,
    "TrainingError": 5,
    "RankLostError": 6,
    "OtherRankError": 2,  # until it is given that of the rank that failed
    "RunInterruptedError": 130,
}


def test_every_error_has_the_exit_code_that_the_help_gives_it() -> None:
    kinds = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, FinetuneError) and kind is not FinetuneError
    }
    assert {name: int(kind.exit_code) for name, kind in kinds.items()} == CODES


@pytest.mark.parametrize(
    ("code", "says"),
    [(0, "written"), (1, "bug"), (2, "flag"), (3, "memory"), (4, "disk"), (5, "loss"), (130, "SIGTERM")],
)
def test_every_exit_code_is_explained(code: int, says: str) -> None:
    assert says in ExitCode(code).meaning


def test_every_problem_is_told_with_field_value_and_remedy() -> None:
    problems = [Problem(field=f"field{i}", value=f"value{i}", why=f"why{i}", remedy=f"remedy{i}") for i in range(2)]
    error = ConfigError(*problems)
    assert error.problems == tuple(problems)
    assert str(error).splitlines() == [f"field{i} = 'value{i}': why{i}; remedy{i}" for i in range(2)]


def test_out_of_memory_carries_its_figures() -> None:
    error = OutOfMemoryError("no", budget_bytes=3, held_bytes=2, savings=(("--rank 8", 1),))
    assert (error.budget_bytes, error.held_bytes, error.savings) == (3, 2, (("--rank 8", 1),))
