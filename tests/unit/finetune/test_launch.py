"""Which rank a process is, from the environment that a launcher makes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from finetune import launch

if TYPE_CHECKING:
    import pytest

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")


def started(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_a_process_without_a_launcher_is_a_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for environment in ({}, {"RANK": "3"}, {"RANK": "3", "WORLD_SIZE": "4"}):  # a batch system sets some of these too
        started(monkeypatch, **environment)
        assert (launch.rank(), launch.size(), launch.local_rank(), launch.is_first()) == (0, 1, 0, True)
        assert launch.who() == ""


def test_a_rank_of_the_second_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="host")
    assert (launch.rank(), launch.size(), launch.local_rank(), launch.is_first()) == (3, 4, 1, False)
    assert launch.who() == ", rank 3"


def test_what_all_ranks_would_say_is_said_by_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in ("0", "1"):
        started(monkeypatch, RANK=rank, WORLD_SIZE="2", MASTER_ADDR="host")
        with launch.said_once():
            print(f"out of rank {rank}")
            print(f"err of rank {rank}", file=sys.stderr)
    assert capsys.readouterr() == ("out of rank 0\n", "err of rank 0\n")
