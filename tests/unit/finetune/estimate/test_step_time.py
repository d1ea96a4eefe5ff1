"""The estimated time of a step: beside what was measured on an H200, and what each setting does to it."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.config import yaml_file
from finetune.config.settings import RunConfig
from finetune.estimate.card_speed import CardSpeed, speed_of
from finetune.estimate.step_time import StepTime, step_time
from finetune.model.shapes import SHAPES
from pytest_vram.drygpu import CARDS, find_card


def speed(name: str) -> CardSpeed:
    card = find_card(name)
    return speed_of(card.product, card.capability, card.multiprocessors)


def of(card: str = "rtx-4080", ranks: int = 1, **settings: Any) -> StepTime:
    settings = {"model": "mistral-7b", "device": "cuda", "kernels": "torch", "checkpointing": "all"} | settings
    config = yaml_file.replace(RunConfig(), settings)
    shape = SHAPES[settings["model"]].fields()
    return step_time(config, shape, speed(card), capability=find_card(card).capability, ranks=ranks)


H200 = {"card": "h200", "model": "llama-3.1-8b", "micro_batch": 4, "seq": 2048, "accumulation": 1}


def test_a_step_on_an_h200_is_near_what_was_measured() -> None:
    """TRL needed 0.987 s, this program 1.203 s before its kernels were fused; their products took 0.49 s."""
    found = of(**H200)
    assert found.products == pytest.approx(0.49, rel=0.05)
    assert 6_800 < found.tokens_per_second < 8_400


@pytest.mark.parametrize(
    ("name", "tera"), [("h200", 989), ("a100-80", 312), ("l4", 121), ("t4", 65), ("rtx-3090", 71), ("rtx-4090", 165)]
)
def test_peaks_are_those_of_the_data_sheets(name: str, tera: float) -> None:
    assert speed(name).half == pytest.approx(tera * 1e12, rel=0.09)  # NVIDIA states an H200's at a lower clock


def test_every_card_of_the_table_has_a_speed_and_an_unknown_one_that_of_its_like() -> None:
    for card in CARDS:
        found = speed(card.name)
        assert 2e13 < found.half < 3e15
        assert 2e11 < found.bandwidth < 1e13
    known = speed("a100-80")
    unknown = speed_of("NVIDIA of tomorrow", (8, 0), 108)
    assert unknown.half == known.half


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ({"checkpointing": "all"}, {"checkpointing": 16}),
        ({"checkpointing": 16}, {"checkpointing": "none"}),
        ({"micro_batch": 1, "accumulation": 16}, {"micro_batch": 16, "accumulation": 1}),
        ({"precision": "fp32"}, {"precision": "bf16"}),
        ({"model": "mixtral-8x7b"}, {"model": "mistral-7b"}),
        ({"seq": 4096, "micro_batch": 1}, {"seq": 512, "micro_batch": 8}),  # attention
        ({"dropout": 0.1}, {"kernels": "auto"}),
        ({"accumulation": 16}, {"accumulation": 16, "ranks": 2}),
    ],
    ids=str,
)
def test_what_a_setting_costs(slower: dict[str, Any], faster: dict[str, Any]) -> None:
    assert of(**slower).tokens_per_second < of(**faster).tokens_per_second


def test_a_step_of_small_batches_waits_for_the_host() -> None:
    small = of("h200", seq=32, model="llama-3.2-1b")
    assert small.launches > small.products + small.attention + small.memory
    assert small.seconds == pytest.approx(small.launches + small.update)


def test_each_layer_that_recomputes_launches_its_kernels_again() -> None:
    every, half, none = (
        of("h200", checkpointing=layers, offload_activations=False).launches for layers in ("all", 16, "none")
    )
    assert half > none
    assert every - half == pytest.approx(half - none)  # Mistral-7B has 32 layers


def test_recomputing_costs_half_of_the_products_of_a_frozen_base() -> None:
    every, none = of(checkpointing="all").products, of(checkpointing="none").products
    assert every / none == pytest.approx(1.5, abs=0.03)


def test_fused_layers_do_not_compute_their_last_product_again() -> None:
    """It has 58.7 of the 218.1 million weights of a layer of Mistral-7B."""
    run = {"kernels": "auto", "micro_batch": 4}
    every, none = (of(checkpointing=layers, **run).products for layers in ("all", "none"))
    assert every / none == pytest.approx(1.5 - 58.7 / 218.1 / 2, abs=0.01)
    decoded = {name: of(checkpointing="all", **run | {"dropout": drop}).memory for name, drop in (("a", 0), ("b", 0.1))}
    assert decoded["a"] < decoded["b"]


def test_the_loss_in_one_kernel_moves_fewer_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    run = H200 | {"kernels": "auto"}
    with_kernel = of(**run)
    monkeypatch.setattr("finetune.estimate.step_time.runs_kernels", lambda _: False)
    assert of(**run).memory - with_kernel.memory == pytest.approx(46 * 8192 * 128256 / (0.6 * 4.8e12), rel=0.05)
    assert of(**run).launches > with_kernel.launches


@pytest.mark.parametrize("card", ["rtx-4080", "a100-80", "h200"])
@pytest.mark.parametrize("seq", [2048, 8192])
def test_copies_of_inputs_run_beside_the_layers_of_a_7b_model(card: str, seq: int) -> None:
    """64 MiB cross the bus in 3 ms, and one of its layers takes 24 ms forward on an A100: 8,192 tokens."""
    there, here = of(card, seq=seq, offload_activations=True), of(card, seq=seq, offload_activations=False)
    assert there.bus == 0
    assert there.seconds == here.seconds
    assert of(card, seq=seq) == there  # what is left open waits on the host


def test_copies_cost_time_where_a_layer_is_narrow_or_the_step_waits_for_the_host() -> None:
    narrow = {"model": "smollm2-135m", "micro_batch": 16, "seq": 2048, "kernels": "auto"}
    there, here = (of("h200", offload_activations=on_host, **narrow) for on_host in (True, False))
    assert there.bus > 0
    assert there.seconds == pytest.approx(here.seconds + there.bus)
    there, here = (of("h200", seq=16, precision="bf16", offload_activations=on_host) for on_host in (True, False))
    assert there.bus == 0
    assert there.launches > here.launches
    assert of("h200", seq=16, offload_activations=True, checkpointing=1).seconds == pytest.approx(
        of("h200", seq=16, offload_activations=False, checkpointing=1).seconds
    )
