"""Each rank holds a part of the base: the run is that of one process, and no rank waits for one that has less to do."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch
from adapter_runs import assert_same_run, column, distance

from finetune.disk import checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Forked, Outcome

EXACT = ("--optimizer", "adamw", "--epochs", "0.5", "--accumulation", "3", "--save-every", "4")
"""torch's AdamW, whose update does not divide by what bitsandbytes rounds. Windows of three: one rank has two of them,
the other one."""


@pytest.fixture(scope="module")
def alone(qlora: Forked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    outcome = qlora(output, *EXACT)
    assert outcome.code == 0, outcome.err
    return output


@pytest.fixture(scope="module")
def sharded(qlora: Forked, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    """The same run of two ranks, each with its part of the base."""
    output = tmp_path_factory.mktemp("sharded") / "run"
    outcomes = qlora.ranks(2, output, *EXACT, "--shard")
    assert [outcome.code for outcome in outcomes] == [0, 0], [outcome.err for outcome in outcomes]
    return output, outcomes


def test_a_sharded_run_is_that_of_one_process(alone: Path, sharded: tuple[Path, list[Outcome]]) -> None:
    output, (_, second) = sharded
    assert_same_run(output, alone)
    assert (second.out, second.err) == ("", "")


def test_parts_that_wait_on_the_host_give_the_same_bits(
    qlora: Forked, sharded: tuple[Path, list[Outcome]], tmp_path: Path
) -> None:
    """The weights that a layer computes with are the same, wherever a rank's part of them waits."""
    outcomes = qlora.ranks(2, tmp_path / "run", *EXACT, "--shard", "--offload-base")
    assert [outcome.code for outcome in outcomes] == [0, 0], [outcome.err for outcome in outcomes]
    assert distance(tmp_path / "run", sharded[0]) == 0
    assert column(tmp_path / "run", "loss") == column(sharded[0], "loss")


def test_a_killed_rank_ends_the_others_and_one_process_goes_on(qlora: Forked, alone: Path, tmp_path: Path) -> None:
    """The checkpoint is whole, and the fingerprint of a base in parts is that of the whole base."""
    output = tmp_path / "run"
    fault = {"kind": "signal", "at": 24, "signals": [signal.SIGKILL], "rank": 1}
    first, second = qlora.ranks(2, output, *EXACT, "--shard", "--save-every", "1", fault=fault)
    assert second.code == -signal.SIGKILL
    assert first.code == 6, first.err
    assert "is gone without a message" in first.err
    assert "Traceback" not in first.err
    refused = qlora(output, *EXACT, "--resume")
    assert refused.code == 2
    assert "or use --no-shard" in refused.err
    resumed = qlora(output, *EXACT, "--resume", "--no-shard")
    assert resumed.code == 0, resumed.err
    assert "the number of processes was 2 and is now 1" in resumed.err
    assert "shard changed: the result is equal up to rounding" in resumed.err
    assert "no checkpoint" not in resumed.err
    assert distance(output, alone) < 1e-5


def test_a_sharded_run_goes_from_two_ranks_to_four_to_one(qlora: Forked, tmp_path: Path) -> None:
    """Four ranks with a part each, and a checkpoint that any number of them can take on."""
    flags = (*EXACT, "--accumulation", "4", "--schedule", "constant", "--answer-tokens", "0")
    alone = qlora(tmp_path / "alone", *flags, "--max-steps", "6")
    assert alone.code == 0, alone.err
    output = tmp_path / "run"
    for ranks, steps, again in ((2, "2", ()), (4, "4", ("--resume",))):
        outcomes = qlora.ranks(ranks, output, *flags, "--max-steps", steps, *again, "--shard")
        assert {outcome.code for outcome in outcomes} == {0}, [outcome.err for outcome in outcomes]
    last = qlora(output, *flags, "--max-steps", "6", "--resume", "--no-shard")
    assert last.code == 0, last.err
    assert "the number of processes was 4 and is now 1" in last.err
    assert distance(output, tmp_path / "alone") < 1e-5


@pytest.mark.parametrize(
    ("fault", "code", "says", "by"),
    [
        ({"kind": "full", "at": 40, "rank": 0}, 4, "finetune.qlora: cannot write", 0),
        ({"kind": "memory", "at": 9, "of": "torch", "rank": 1}, 3, "finetune.qlora, rank 1: out of memory", 1),
        ({"kind": "signal", "at": 16, "signals": [signal.SIGTERM], "rank": 1}, 130, "stopped after step", None),
    ],
)
def test_what_ends_one_rank_is_told_once_and_ends_all(
    qlora: Forked, tmp_path: Path, fault: dict[str, Any], code: int, says: str, by: int | None
) -> None:
    """The ranks wait for each other in every layer. What was saved is sound."""
    output = tmp_path / "run"
    outcomes = qlora.ranks(2, output, *EXACT, "--shard", "--save-every", "1", fault=fault)
    assert [outcome.code for outcome in outcomes] == [code, code], [outcome.err for outcome in outcomes]
    said = [outcome.err.count(says) for outcome in outcomes]
    assert sum(said) == 1
    assert by is None or said[by] == 1
    assert "Traceback" not in "".join(outcome.err for outcome in outcomes)
    for path in checkpoint.paths(output / "checkpoints"):
        checkpoint.load(path)


def test_experts_are_sharded_and_an_empty_pass_adds_no_router_loss(
    qlora: Forked, tiny_llama: Path, tmp_path: Path
) -> None:
    """Three experts for two ranks, and fp4 without double quantization."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "mixtral")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(
        vocab_size=260, num_key_value_heads=2, num_local_experts=3, output_router_logits=True, **sizes
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    flags = ("--model", str(tmp_path / "mixtral"), "--precision", "fp4", "--no-double-quant", "--max-steps", "2")
    alone = qlora(tmp_path / "alone", *EXACT, *flags)
    assert alone.code == 0, alone.err
    outcomes = qlora.ranks(2, tmp_path / "sharded", *EXACT, *flags, "--shard")
    assert [outcome.code for outcome in outcomes] == [0, 0], [outcome.err for outcome in outcomes]
    assert distance(tmp_path / "sharded", tmp_path / "alone") < 1e-5
    ours, theirs = (column(tmp_path / name, "router_loss") for name in ("sharded", "alone"))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert min(theirs) > 0


def test_what_cannot_be_sharded_is_refused_once(qlora: Forked, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    for flags, says in (
        (("--data", str(bad)), f"{bad}:2"),
        (("--precision", "bf16"), "use --precision nf4 or fp4"),
        (("--dora",), "use --no-dora"),
        (("--merge", "full-base"), "merge afterwards in one process"),
    ):
        outcomes = qlora.ranks(2, tmp_path / "run", *flags, "--shard")
        assert [outcome.code for outcome in outcomes] == [2, 2], [outcome.err for outcome in outcomes]
        assert "".join(outcome.err for outcome in outcomes).count(says) == 1
