"""A trial counts exactly the bytes of its own tensors, and none of earlier trials on the same base."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from finetune.config import yaml_file
from finetune.config.settings import RunConfig
from finetune.dryrun.command import trials
from finetune.estimate.arithmetic import estimate

if TYPE_CHECKING:
    from finetune.dryrun.messages import Trial

pytest.importorskip("bitsandbytes")

# Every size a multiple of the allocator's blocks of 512 bytes, so that the arithmetic is exact.
FIELDS = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
CHANGES: dict[str, dict[str, Any]] = {
    "first": {},
    "long": {"seq": 2048},
    "too long": {"seq": 32768, "micro_batch": 512, "checkpointing": False},
    "again": {},
    "16 micro-batches, paged": {"accumulation": 16},
    "adamw": {"optimizer": "adamw"},
    "2 micro-batches": {"optimizer": "adamw", "accumulation": 2},
    "16 micro-batches": {"optimizer": "adamw", "accumulation": 16},
    "adamw-8bit": {"optimizer": "adamw-8bit"},
}
SETTINGS = {"seq": 256, "accumulation": 1, "optimizer": "paged-adamw", "rank": 16, "device": "cuda"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(FIELDS))
    return yaml_file.replace(RunConfig(), SETTINGS | {"model": str(folder)})


def test_packing_is_measured_with_rows_that_share_a_sequence(config: RunConfig) -> None:
    """They need no less than one row that fills it, which is tried as well, and not much more."""
    packed = {"seq": 1024, "packing": True}
    alone, shared = trials(config, [packed | {"packing": False}, packed], "rtx-4080")
    assert alone.fits
    assert shared.fits
    assert alone.peak_allocated <= shared.peak_allocated <= 1.1 * alone.peak_allocated


@pytest.fixture(scope="module")
def found(config: RunConfig) -> dict[str, Trial]:
    return dict(zip(CHANGES, trials(config, list(CHANGES.values()), "rtx-4080"), strict=True))


@pytest.mark.parametrize(("name", "paged"), [("first", True), ("adamw", False)])
def test_what_outlives_a_step_is_what_the_arithmetic_says(
    config: RunConfig, found: dict[str, Trial], name: str, paged: bool
) -> None:
    expected = estimate(yaml_file.replace(config, CHANGES[name]), FIELDS)
    categories = found[name].categories
    frequencies = 2 * 512  # the rotary embedding's, and a copy
    assert categories["weights"] == expected.weights + frequencies
    for category in ("quantization", "adapters", "optimizer"):
        assert categories[category] == getattr(expected, category), category
    assert found[name].managed == expected.managed
    assert (expected.managed > 0) == paged


def test_a_table_that_all_states_share_counts_once(config: RunConfig, found: dict[str, Trial]) -> None:
    expected = estimate(yaml_file.replace(config, CHANGES["adamw-8bit"]), FIELDS).optimizer
    # Small scales are rounded up to blocks of 512 bytes; the two tables are 1,024 bytes each.
    assert expected < found["adamw-8bit"].categories["optimizer"] < 1.05 * expected


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "too long"])
def test_the_categories_come_to_the_peak(found: dict[str, Trial], name: str) -> None:
    trial = found[name]
    assert trial.fits
    assert sum(trial.categories.values()) == trial.peak_allocated
    assert trial.peak_allocated == max(size for phase, size in trial.phases.items() if phase != "loading")
    assert trial.peak_allocated <= trial.peak_reserved <= trial.peak_device - trial.context


def test_a_trial_knows_nothing_of_those_before_it(found: dict[str, Trial]) -> None:
    # cuBLAS' workspace is there from the first product on, and time is time.
    first, again = (
        replace(found[name], seconds=0.0, phases=found[name].phases | {"adapter": 0}) for name in ("first", "again")
    )
    assert again == first


def test_more_tokens_need_more_and_too_many_are_refused(found: dict[str, Trial]) -> None:
    assert found["long"].peak_allocated > found["first"].peak_allocated
    assert not found["too long"].fits
    assert "out of memory" in found["too long"].message
    assert found["too long"].peak_device <= found["too long"].total


def test_a_second_micro_batch_adds_the_gradients_of_the_first_and_later_ones_nothing(
    found: dict[str, Trial],
) -> None:
    one, two, many = (
        found[name].phases["forward and backward"] for name in ("adamw", "2 micro-batches", "16 micro-batches")
    )
    assert 0 < two - one <= found["first"].categories["adapters"]
    assert many == two


def test_under_a_paged_optimizer_accumulation_needs_nothing(found: dict[str, Trial]) -> None:
    many, one = found["16 micro-batches, paged"], found["first"]
    assert many.peak_allocated == one.peak_allocated
    assert many.categories == one.categories


@pytest.mark.skipif(torch.__version__ < "2.7", reason="--shard needs torch 2.7")
def test_sharded_trials_over_one_base_are_alike(config: RunConfig) -> None:
    """A search over several cards attaches one adapter after another to a base that is spread already."""
    sharded = yaml_file.replace(config, {"shard": True, "count": 2, "dry_run": True, "accumulation": 2})
    first, small, again = trials(sharded, [{}, {"rank": 8}, {}], "rtx-4080")
    assert [trial.rank for trial in first.by_rank] == [0, 1]
    assert first.fits
    assert 2 * small.categories["adapters"] == first.categories["adapters"]
    assert again.phases["update"] == first.phases["update"]
    assert again.peak_allocated == pytest.approx(first.peak_allocated, abs=2**16)  # a table that the first trial makes
