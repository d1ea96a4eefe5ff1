"""All weights trained by ranks that each hold a part of them: the run is that of one process, and goes on elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from adapter_runs import assert_same_run

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Forked

FULL = ("--full", "--precision", "fp32", "--epochs", "0.5", "--accumulation", "3", "--optimizer", "adamw")


@pytest.fixture(scope="module")
def alone(qlora: Forked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    outcome = qlora(output, *FULL)
    assert outcome.code == 0, outcome.err
    return output


def test_a_run_of_parts_is_that_of_one_process(qlora: Forked, alone: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    outcomes = qlora.ranks(2, output, *FULL, "--shard")
    assert [outcome.code for outcome in outcomes] == [0, 0], [outcome.err for outcome in outcomes]
    assert_same_run(output, alone)
