"""All weights trained by ranks that each hold a part of them: the run is that of one process, and goes on elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from adapter_runs import assert_same_run, distance

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Forked

FULL = ("--full", "--precision", "fp32", "--optimizer", "adamw", "--schedule", "constant", "--accumulation", "3")
"""Windows of three micro-batches: of two ranks, one runs an empty pass beside the other's second one."""


@pytest.fixture(scope="module")
def untied(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a head of its own, so that ranks have parts of the token table and of the head."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("untied")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    config = LlamaConfig.from_pretrained(tiny_llama, tie_word_embeddings=False, num_hidden_layers=1)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_run_goes_from_two_ranks_to_four_to_one(qlora: Forked, untied: Path, tmp_path: Path) -> None:
    """Weights and optimizer states of a checkpoint are whole, whatever the number of ranks that wrote it."""
    model = ("--model", str(untied), "--accumulation", "4")
    alone = qlora(tmp_path / "alone", *FULL, *model, "--max-steps", "6")
    assert alone.code == 0, alone.err
    output = tmp_path / "run"
    for ranks, steps in ((2, 2), (4, 4)):
        flags = (*FULL, *model, "--max-steps", str(steps), *(("--resume",) if ranks == 4 else ()))
        outcomes = qlora.ranks(ranks, output, *flags, "--shard")
        assert {outcome.code for outcome in outcomes} == {0}, [outcome.err for outcome in outcomes]
    last = qlora(output, *FULL, *model, "--max-steps", "6", "--resume", "--no-shard")
    assert last.code == 0, last.err
    assert "the number of processes was 4 and is now 1" in last.err
    assert distance(output, tmp_path / "alone") < 1e-5


def test_tied_tables_stay_whole_and_paged_states_are_put_together(qlora: Forked, tmp_path: Path) -> None:
    """An uneven window, and the optimizer whose states bitsandbytes makes."""
    flags = (*FULL, "--optimizer", "paged-adamw", "--max-steps", "3")
    alone = qlora(tmp_path / "alone", *flags)
    assert alone.code == 0, alone.err
    output = tmp_path / "run"
    outcomes = qlora.ranks(2, output, *flags, "--shard")
    assert [outcome.code for outcome in outcomes] == [0, 0], [outcome.err for outcome in outcomes]
    assert_same_run(output, tmp_path / "alone")
