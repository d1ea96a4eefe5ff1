"""What fits which card, at full size: the figures that the README gives, taken again on a dry GPU.

Every row is the real training step of ``python -m finetune.qlora``, loading included, on the card of its name with the
context counted. A figure here is to be changed only together with the README's.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from finetune import configfile
from finetune.config import RunConfig
from finetune.dryrun import trials

pytest.importorskip("bitsandbytes")

GIB = 2**30
QLORA = {"precision": "nf4", "rank": 16, "optimizer": "paged-adamw", "seq": 2048, "micro_batch": 1, "accumulation": 16}
FULL = {"full": True, "seq": 512, "accumulation": 1, "checkpointing": False}


@functools.cache
def _taken(card: str, total_bytes: int | None, base: str, changes: str) -> list[dict[str, Any]]:
    config = configfile.replace(RunConfig(), json.loads(base) | {"device": "cuda"})
    return trials(config, json.loads(changes), card, total_bytes=total_bytes)


def step(
    card: str, model: str, *changes: dict[str, Any], total_bytes: int | None = None, **base: Any
) -> list[dict[str, Any]]:
    """Trials of one base, loaded once for all ``changes`` and for every test that asks the same."""
    settings = QLORA | base | {"model": model}
    return _taken(card, total_bytes, json.dumps(settings, sort_keys=True), json.dumps(changes or ({},)))


def budget(gib: float) -> int:
    """The README's figure and 2%. A step that needs less is welcome, and is a reason to take the figure anew."""
    return round(1.02 * gib * GIB)


ROWS_4080: tuple[dict[str, Any], ...] = (
    {},
    {"seq": 512, "micro_batch": 38},
    {"seq": 512, "micro_batch": 40},
)


def test_mistral_7b_in_16_gb_with_half_the_card_to_spare() -> None:
    trial = step("rtx-4080", "mistral-7b", *ROWS_4080)[0]
    assert trial["fits"]
    assert trial["peak_device"] < trial["total"] / 2
    assert trial["peak_device"] <= budget(5.88)


def test_the_largest_micro_batch_of_512_tokens_in_16_gb() -> None:
    _, most, more = step("rtx-4080", "mistral-7b", *ROWS_4080)
    limit = 0.97 * most["total"]
    assert most["fits"]
    assert most["peak_device"] <= limit < more["peak_device"]


def test_mistral_7b_in_8_gb() -> None:
    (trial,) = step("rtx-4060", "mistral-7b")
    assert trial["fits"]
    assert trial["peak_device"] <= budget(5.73)


def test_llama_31_8b_with_its_128_thousand_words_in_16_gb() -> None:
    (trial,) = step("rtx-4060ti-16", "llama-3.1-8b")
    assert trial["fits"]
    assert trial["peak_device"] <= budget(7.93)
    # The logits of one chunk of tokens, not of the row.
    assert trial["categories"]["logits"] < 2048 * 128256 * 4


def test_llama_2_70b_on_one_48_gb_card() -> None:
    (trial,) = step("l40s", "llama-2-70b")
    assert trial["fits"]
    assert trial["peak_device"] <= budget(39.50)


def test_mixtral_8x7b_with_its_experts_in_4_bits_on_one_32_gb_card() -> None:
    (trial,) = step("rtx-5090", "mixtral-8x7b")
    assert trial["fits"]
    assert trial["peak_device"] <= budget(28.36)


def test_mixtral_8x7b_in_half_precision_takes_two_80_gb_cards() -> None:
    from finetune.estimate import estimate
    from pytest_vram.drygpu import find_card

    card = find_card("a100-80")
    run = configfile.replace(RunConfig(), QLORA | {"model": "mixtral-8x7b", "precision": "bf16", "device": "cuda"})
    needed = estimate(run, capability=card.capability, context_bytes=card.context_bytes).total_bytes
    # Weights of 86.99 GiB: more than one card, and than the article's 65 GB; measured 91.93 GiB in all.
    assert card.total_bytes < needed < 2 * card.total_bytes
    assert needed == pytest.approx(91.93 * GIB, rel=0.05)


@pytest.mark.parametrize(
    ("precision", "measured", "card", "fits"),
    [("fp32", 137.82, "a100-80", False), ("fp32", 137.82, "h200", True), ("bf16", 69.26, "a100-80", True)],
)
def test_a_full_fine_tune_of_mistral_7b(precision: str, measured: float, card: str, fits: bool) -> None:
    """By arithmetic, which is held to what the ladder measured; the step itself takes a minute to load."""
    from finetune.estimate import estimate
    from pytest_vram.drygpu import find_card

    settings = FULL | {"model": "mistral-7b", "precision": precision, "optimizer": "adamw"}
    needed = estimate(configfile.replace(RunConfig(), settings), context_bytes=find_card(card).context_bytes)
    assert (needed.total_bytes <= find_card(card).total_bytes) == fits
    assert needed.total_bytes == pytest.approx(measured * GIB, rel=0.03)
