"""Several processes train one adapter: to the last bits that of one process, and whatever ends one ends all of them."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch
from adapter_runs import assert_same_run, distance, weights

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Forked, Outcome

EXACT = ("--optimizer", "adamw", "--epochs", "0.5")
"""torch's AdamW, whose update does not divide by what bitsandbytes rounds."""


@pytest.fixture(scope="module")
def alone(qlora: Forked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    outcome = qlora(output, *EXACT)
    assert outcome.code == 0, outcome.err
    return output


@pytest.fixture(scope="module")
def pair(qlora: Forked, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    """The same run of two ranks."""
    output = tmp_path_factory.mktemp("pair") / "run"
    outcomes = qlora.ranks(2, output, *EXACT)
    assert [outcome.code for outcome in outcomes] == [0, 0], [outcome.err for outcome in outcomes]
    return output, outcomes


def test_two_ranks_are_one_process(alone: Path, pair: tuple[Path, list[Outcome]]) -> None:
    output, _ = pair
    assert_same_run(output, alone)


def test_rank_0_prints_and_writes_and_the_others_say_nothing(pair: tuple[Path, list[Outcome]]) -> None:
    output, (first, second) = pair
    assert "held-out loss" in first.out
    assert (second.out, second.err) == ("", "")
    assert [path.name for path in output.rglob(".*")] == [".lock"]


def test_a_signal_to_one_rank_saves_and_one_process_goes_on(qlora: Forked, alone: Path, tmp_path: Path) -> None:
    """Four ranks, the signal in one of them; the run goes on with another number of processes."""
    output = tmp_path / "run"
    fault = {"kind": "signal", "at": 9, "signals": [signal.SIGTERM], "rank": 2}
    outcomes = qlora.ranks(4, output, *EXACT, fault=fault)
    assert {outcome.code for outcome in outcomes} == {130}, [outcome.err for outcome in outcomes]
    said = "".join(outcome.err for outcome in outcomes)
    assert said.count("stopped after step") == 1
    assert "Traceback" not in said
    resumed = qlora(output, *EXACT, "--resume")
    assert resumed.code == 0, resumed.err
    assert "the number of processes was 4 and is now 1" in resumed.err
    assert "step 1/5" not in resumed.err
    assert distance(output, alone) < 1e-5


def test_a_killed_rank_ends_the_others_and_two_ranks_go_on(
    qlora: Forked, pair: tuple[Path, list[Outcome]], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    fault = {"kind": "signal", "at": 22, "signals": [signal.SIGKILL], "rank": 1}
    first, second = qlora.ranks(2, output, *EXACT, "--save-every", "1", fault=fault)
    assert second.code == -signal.SIGKILL
    assert first.code == 6, first.err
    assert "rank 1 (process " in first.err
    assert "is gone without a message" in first.err
    assert "Traceback" not in first.err
    resumed = qlora.ranks(2, output, *EXACT, "--resume")
    assert [outcome.code for outcome in resumed] == [0, 0], resumed[0].err
    assert "resuming" in resumed[0].err
    assert weights(output).keys() == weights(pair[0]).keys()
    assert all(torch.equal(weights(output)[name], value) for name, value in weights(pair[0]).items())


@pytest.mark.parametrize(
    ("fault", "code", "says", "by"),
    [
        ({"kind": "full", "at": 40, "rank": 0}, 4, "finetune.qlora: cannot write", 0),
        ({"kind": "memory", "at": 6, "of": "torch", "rank": 1}, 3, "finetune.qlora, rank 1: out of memory", 1),
    ],
)
def test_the_failure_of_one_rank_is_told_once_and_ends_all(
    qlora: Forked, tmp_path: Path, fault: dict[str, Any], code: int, says: str, by: int
) -> None:
    outcomes = qlora.ranks(2, tmp_path / "run", *EXACT, fault=fault)
    assert [outcome.code for outcome in outcomes] == [code, code], [outcome.err for outcome in outcomes]
    assert says in outcomes[by].err
    assert "finetune.qlora" not in outcomes[1 - by].err
    assert "Traceback" not in "".join(outcome.err for outcome in outcomes)


def test_a_bad_row_and_a_step_too_small_are_refused_once(qlora: Forked, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    for flags, says in (
        (("--data", str(bad)), f"{bad}:2"),
        (("--accumulation", "1"), "use --accumulation 2 or more"),
        (("--rank", "0"), "rank = 0"),
    ):
        outcomes = qlora.ranks(2, tmp_path / "run", *flags)
        assert [outcome.code for outcome in outcomes] == [2, 2], [outcome.err for outcome in outcomes]
        assert "".join(outcome.err for outcome in outcomes).count(says) == 1
