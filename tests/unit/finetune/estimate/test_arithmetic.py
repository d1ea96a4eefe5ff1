"""The arithmetic of a step's memory: the figures of the article, published sizes, and the effect of each setting."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from finetune.config import yaml_file
from finetune.config.settings import RunConfig
from finetune.errors import ConfigError
from finetune.estimate.arithmetic import Estimate, article_figures, constant_bytes, estimate, optimizer_bytes
from finetune.estimate.dimensions import Dimensions
from finetune.model.shapes import SHAPES, Shape


def of(**settings: Any) -> Estimate:
    settings = {"model": "mistral-7b", "device": "cuda", "kernels": "torch"} | settings
    return estimate(yaml_file.replace(RunConfig(), settings))


def test_the_figures_of_the_article() -> None:
    found = article_figures()
    assert [found[name] for name in ("fp32", "fp16", "int8", "nf4")] == [28, 14, 7, 3.5]
    assert found["gradients"] == 28
    assert found["optimizer"] == 2 * 28
    assert found["full"] == 112
    assert found["over_16"] == 96


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_dimensions_count_the_published_number_of_parameters(shape: Shape) -> None:
    assert Dimensions.of(shape.fields()).parameters == shape.parameters


def test_a_full_fine_tune_in_fp32_is_the_articles_sum_for_the_real_count() -> None:
    found = of(precision="fp32", full=True, optimizer="adamw", seq=1, accumulation=1)
    assert found.weights == found.gradients == 4 * 7_241_732_096
    assert found.optimizer == 8 * 7_241_732_096
    assert found.adapters == found.quantization == 0
    assert found.moment == "update"
    # What the article leaves out: PyTorch's update holds one more copy of the parameters.
    assert found.temporary == found.weights


def test_half_precision_halves_weights_gradients_and_states() -> None:
    full = of(precision="fp32", full=True, optimizer="adamw")
    half = of(precision="bf16", full=True, optimizer="adamw")
    assert (half.weights * 2, half.gradients * 2, half.optimizer * 2) == (full.weights, full.gradients, full.optimizer)


def test_double_quantization_saves_what_its_paper_says() -> None:
    """0.373 bits a parameter: 32/64 against 8/64 + 32/(64 * 256)."""
    saved = of(double_quant=False).quantization - of(double_quant=True).quantization
    linear = sum(part.elements for part in Dimensions.of(SHAPES["mistral-7b"].fields()).linears)
    assert saved * 8 / linear == pytest.approx(0.373, abs=0.001)


def test_constants_of_one_matrix() -> None:
    part = Dimensions.of(SHAPES["mistral-7b"].fields()).linears[0]  # 4096 x 4096
    scales = 4096 * 4096 // 64
    assert constant_bytes(part, "nf4", double_quant=False) == 4 * scales + 512
    assert constant_bytes(part, "nf4", double_quant=True) == scales + 4 * scales // 256 + 1024 + 512 + 512
    assert constant_bytes(part, "int8", double_quant=True) == 4 * 4096
    assert constant_bytes(part, "bf16", double_quant=True) == 0


def test_an_adapter_trains_a_few_percent_at_most() -> None:
    found = of(rank=16)
    assert found.trainable == 41_943_040  # what peft prints for this model, rank and targets
    assert found.trainable / found.parameters < 0.01


@pytest.mark.parametrize(
    ("optimizer", "ordinary", "managed"),
    [
        ("adamw", 2 * 2 * 212_000, 0),
        ("paged-adamw", 2 * 4 * 4_000, 2 * 4 * 208_000),
        ("adamw-8bit", 2 * 208_000 + 8 * (782 + 32) + 2 * 4 * 4_000, 0),
        ("paged-adamw-8bit", 2 * 4 * 4_000 + 8 * (782 + 32), 2 * 208_000),
    ],
)
def test_states_of_three_bf16_tensors(optimizer: str, ordinary: int, managed: int) -> None:
    tensors = [200_000, 8_000, 4_000]
    assert optimizer_bytes(tensors, optimizer, 2) == (ordinary, managed)
    kept = optimizer_bytes(tensors, optimizer, 2, masters=True)
    large, small = (0, 0) if optimizer == "adamw" else (2 * 208_000, 2 * 4_000)  # PyTorch's has no masters
    paged = large if optimizer.startswith("paged") else 0
    assert kept == (ordinary + large + small - paged, managed + paged)


def test_masters_are_two_bytes_beside_each_weight_and_page_with_its_state() -> None:
    count = 200_000
    assert optimizer_bytes([count], "paged-adamw", 2, masters=True) == (0, 10 * count)
    assert optimizer_bytes([count], "adamw", 2, masters=True) == (4 * count, 0)
    assert of(adapter_dtype="fp32").managed == of().managed * 8 // 10


MEASURED = [
    ({}, 1.261),
    ({"checkpointing": False}, 2.728),
    ({"rank": 64}, 1.324),
    ({"targets": ("q_proj", "v_proj")}, 1.244),
    ({"adapter_dtype": "fp32"}, 1.282),
    ({"optimizer": "adamw"}, 1.324),
    ({"optimizer": "adamw-8bit"}, 1.325),
    ({"dropout": 0.1, "checkpointing": False}, 3.284),
    ({"dora": True}, 1.312),
    ({"dora": True, "checkpointing": False}, 4.169),
    ({"seq": 4096}, 1.771),
    ({"micro_batch": 8}, 2.544),
    ({"seq": 4096, "offload_activations": True}, 1.556),
    ({"precision": "fp4", "seq": 4096}, 1.771),
    ({"precision": "int8", "checkpointing": False}, 3.168),
    ({"precision": "int8", "micro_batch": 8}, 3.172),
    ({"precision": "int8", "seq": 4096}, 2.304),
    ({"precision": "bf16", "seq": 4096}, 3.116),
    ({"precision": "fp32", "seq": 4096}, 6.119),
    ({"precision": "bf16", "full": True, "optimizer": "adamw"}, 11.530),
    ({"precision": "bf16", "full": True, "optimizer": "adamw-8bit", "checkpointing": False}, 10.173),
    ({"precision": "bf16", "full": True}, 6.238),
    ({"precision": "fp32", "full": True, "optimizer": "adamw", "checkpointing": False}, 23.615),
    ({"model": "mistral-7b", "seq": 2048}, 4.974),
    ({"model": "mistral-7b", "seq": 512, "micro_batch": 38}, 13.225),
    ({"model": "mistral-7b", "seq": 16640}, 12.859),  # longer than its window: attention takes a mask
    ({"model": "llama-3.1-8b", "seq": 2048}, 6.443),
    ({"model": "llama-2-70b", "seq": 2048}, 38.112),
    ({"model": "mixtral-8x7b", "seq": 2048}, 25.621),
    ({"model": "mixtral-8x7b", "seq": 2048, "micro_batch": 32}, 57.814),
]
"""Peak allocated GiB of ``python -m finetune.qlora --dry-run``, on the same settings as the test's."""


@pytest.mark.parametrize(("settings", "gib"), MEASURED, ids=lambda value: str(value))
def test_the_arithmetic_is_within_3_percent_of_what_was_measured(settings: dict[str, Any], gib: float) -> None:
    base = {"model": "llama-3.2-1b", "seq": 1024, "accumulation": 2, "optimizer": "paged-adamw"}
    base["offload_activations"] = False
    assert of(**base | settings).allocated_bytes / 2**30 == pytest.approx(gib, rel=0.03)


def test_paged_state_is_not_in_the_total() -> None:
    assert of(optimizer="paged-adamw").managed > 0
    assert of(optimizer="paged-adamw").optimizer < of(optimizer="adamw").optimizer


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"checkpointing": False}, {"checkpointing": True}),
        ({"offload_activations": False}, {"offload_activations": True}),
        ({"seq": 4096}, {"seq": 2048}),
        ({"micro_batch": 4}, {"micro_batch": 1}),
        ({"precision": "bf16"}, {"precision": "int8"}),
        ({"precision": "int8"}, {"precision": "nf4"}),
        ({"rank": 64}, {"rank": 8}),
        ({"adapter_dtype": "fp32"}, {"adapter_dtype": "bf16"}),
        ({"targets": ("all-linear",)}, {"targets": ("q_proj", "v_proj")}),
        ({"exclude": ()}, {"exclude": ("mlp",)}),
        ({"exclude": ("layers.3",)}, {"exclude": ("layers.3", "layers.4")}),
        ({"accumulation": 2, "optimizer": "adamw-8bit"}, {"accumulation": 1, "optimizer": "adamw-8bit"}),
        ({"attention": "eager", "seq": 4096}, {"attention": "sdpa", "seq": 4096}),
        ({"dropout": 0.1, "checkpointing": False}, {"checkpointing": False}),
        ({"model": "llama-2-13b"}, {"model": "llama-2-7b"}),
    ],
)
def test_every_setting_moves_the_total_the_way_it_should(more: dict[str, Any], less: dict[str, Any]) -> None:
    assert of(**more).total_bytes > of(**less).total_bytes


def test_names_choose_layers_as_they_do_in_a_run() -> None:
    every = of().trainable
    assert of(targets=("self_attn", "mlp")).trainable == every
    assert of(targets=("mlp",)).trainable + of(exclude=("mlp",)).trainable == every
    assert of(targets=("layers.0",)).trainable * 32 == every
    assert of(targets=(r".*\.[qv]_proj",)).trainable == of(targets=("q_proj", "v_proj")).trainable


def test_accumulation_costs_one_set_of_gradients_however_long() -> None:
    kept = {"optimizer": "adamw-8bit", "offload_activations": False}
    one, two, many = (of(accumulation=count, **kept) for count in (1, 2, 16))
    assert many.total_bytes == two.total_bytes
    assert two.gradients - one.gradients == two.trainable * 2


def test_accumulation_costs_nothing_where_earlier_gradients_wait_on_the_host() -> None:
    assert of(accumulation=16).total_bytes == of(accumulation=1).total_bytes
    for kept in ({"full": True, "precision": "bf16", "checkpointing": False, "seq": 4096}, {"device": "cpu"}):
        assert of(accumulation=2, **kept).total_bytes > of(accumulation=1, **kept).total_bytes


def test_logits_are_a_chunks_not_the_windows() -> None:
    from finetune.estimate.arithmetic import logit_bytes

    dims = Dimensions.of(SHAPES["llama-3.1-8b"].fields())
    config = yaml_file.replace(RunConfig(), {"loss_chunk": 256})
    growth = logit_bytes(dims, config, 8192, 2) - logit_bytes(dims, config, 4096, 2)
    assert growth == 2 * 4096 * 4096 * 2  # hidden states and their gradient, no logits


def test_a_mixture_counts_its_experts() -> None:
    found = of(model="mixtral-8x7b", precision="nf4")
    assert 24e9 < found.weights + found.quantization < 25e9


def test_loading_a_mixture_takes_more_than_a_short_step_and_less_than_a_long_one() -> None:
    short, long = (of(model="mixtral-8x7b", seq=seq) for seq in (2048, 16384))
    assert (short.moment, long.moment) == ("loading", "backward")
    joined = 8 * 2 * 14336 * 4096 * 2  # gates and ups of one layer's experts in bf16
    assert short.temporary == 2 * joined - 8 * 3 * 14336 * 4096 // 2
    assert short.allocated_bytes == pytest.approx(25.62 * 2**30, rel=0.01)  # measured on a dry rtx-5090


def test_a_family_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gpt2.*--dry-run"):
        estimate(RunConfig(), {"model_type": "gpt2"})


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; from finetune.config.settings import RunConfig; "
        "from finetune.estimate.arithmetic import estimate; "
        "estimate(RunConfig()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


LIGER = [(512, False, 4.256), (2048, False, 4.872), (8192, False, 7.620)]
LIGER += [(512, True, 4.212), (2048, True, 4.477), (8192, True, 5.818)]


@pytest.mark.parametrize(("seq", "on_host", "gib"), LIGER)
def test_with_liger_kernel_it_is_near_what_was_measured(
    seq: int, on_host: bool, gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peak allocated of two steps of two micro-batches on a dry A100-80, liger-kernel 0.8.5 installed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    settings = {"seq": seq, "accumulation": 2, "optimizer": "paged-adamw", "offload_activations": on_host}
    found = of(**settings, kernels="auto").allocated_bytes
    assert found / 2**30 == pytest.approx(gib, rel=0.015 if on_host else 0.01)
    without = of(**settings).allocated_bytes
    assert found < without
