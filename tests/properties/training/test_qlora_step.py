"""What a QLoRA step may change, and what stays the same bytes: base, first output, saved and merged model."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from adapted_models import ADAPTER, PRECISIONS, WINDOW, adapted, base_of, gradients, nonzero_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import nf4
from tiny_models import relative_l2, save_tiny
from torch import Tensor
from weight_blocks import same_bits

from finetune.config.settings import ModelConfig, OutputConfig, RunConfig, TrainConfig
from finetune.model.load import attach_adapter
from finetune.model.merge import dequantized_weights, merge
from finetune.training.optim import make_optimizer
from finetune.training.step import evaluate, train_step

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # asked by peft 0.21
]
FEW = settings(max_examples=max(5, settings.default.max_examples // 10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("mixtral"), "mixtral")


def frozen_bytes(model: Any) -> dict[str, Tensor]:
    """Every byte of the base: packed weights, scales, tables, norms, embeddings, buffers."""
    held = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    held |= {n: b.detach().clone() for n, b in model.named_buffers()}
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        states = [state] if state is not None else []
        for listed in getattr(module, "quant_states", {}).values():
            states += listed
        for number, one in enumerate(states):
            for key, value in one.as_dict(packed=True).items():
                held[f"{name}.{number}.{key}"] = value.clone()
    return held


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    changed = [name for name in before if not same_bits(before[name], after[name])]
    assert changed == []


def logits(model: Any, training: bool = False) -> Tensor:
    model.train(training)
    with torch.no_grad():
        out: Tensor = model(input_ids=WINDOW[0].input_ids, attention_mask=WINDOW[0].attention_mask).logits
    return out


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("precision", PRECISIONS)
@given(
    steps=st.integers(1, 4),
    optimizer=st.sampled_from(["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"]),
    checkpointing=st.booleans(),
    rate=st.sampled_from([1e-4, 1.0]),
)
@FEW
def test_no_bit_of_the_base_changes(
    request: pytest.FixtureRequest,
    precision: str,
    kind: str,
    steps: int,
    optimizer: str,
    checkpointing: bool,
    rate: float,
) -> None:
    if kind == "mixtral" and precision == "int8":
        return  # fused experts are refused in int8
    model = cached_model(request, kind, precision)
    before = frozen_bytes(model)
    config = TrainConfig(optimizer=optimizer, learning_rate=rate, checkpointing=checkpointing, max_steps=steps)  # type: ignore[arg-type]  # one of the Literal's values
    made = make_optimizer(model.parameters(), config)
    learned = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for step in range(steps):
        train_step(model, WINDOW, made, config, step=step, total_steps=steps)
        evaluate(model, WINDOW, config)
    logits(model)
    assert_same(before, frozen_bytes(model))
    assert any(not torch.equal(p, learned[n]) for n, p in model.named_parameters() if n in learned)


_MODELS: dict[tuple[str, str], Any] = {}


def cached_model(request: pytest.FixtureRequest, kind: str, precision: str) -> Any:
    if (kind, precision) not in _MODELS:
        _MODELS[kind, precision] = adapted(
            request.getfixturevalue("folder" if kind == "llama" else "mixtral"), precision
        )
    return _MODELS[kind, precision]


def test_the_byte_comparison_can_fail(folder: Path) -> None:
    model = adapted(folder)
    before = frozen_bytes(model)
    packed = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    packed.data[0] ^= 1
    with pytest.raises(AssertionError, match="q_proj"):
        assert_same(before, frozen_bytes(model))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("changes", [{}, {"rslora": True}, {"init": "gaussian"}], ids=str)
def test_before_the_first_step_the_output_is_the_bases(folder: Path, precision: str, changes: dict[str, Any]) -> None:
    base = base_of(folder, precision)
    alone = logits(base)
    model = attach_adapter(base, replace(ADAPTER, **changes), seed=1)
    assert same_bits(logits(model), alone)
    assert not torch.equal(logits(nonzero_adapter(model)), alone)


def test_the_decoded_weights_are_the_reference_codecs(folder: Path) -> None:
    quantized, original = base_of(folder), base_of(folder, "fp32")
    decoded = dict(dequantized_weights(quantized))
    assert len(decoded) == 14
    for name, weight in decoded.items():
        reference = nf4.dequantize(nf4.quantize(original.get_parameter(name), double_quant=True))
        assert same_bits(weight.float(), reference), name


@pytest.mark.parametrize("precision", ["fp4", "nf4"])
def test_mixtrals_experts_compute_with_the_reference_codecs_weights(mixtral: Path, precision: str) -> None:
    quantized, dense = base_of(mixtral, precision), base_of(mixtral, "fp32")
    experts = 0
    with torch.no_grad():
        for name, module in dense.named_modules():
            for weight in ("gate_up_proj", "down_proj"):
                values = dict(module.named_parameters(recurse=False)).get(weight)
                if values is None or values.dim() != 3:
                    continue
                for value in values:
                    coded = nf4.quantize(value, quant_type=precision, double_quant=True)  # type: ignore[arg-type]  # one of the Literal's values
                    value.copy_(nf4.dequantize(coded))
                    experts += 1
                decoded = quantized.get_submodule(name).dequantized(weight)
                # The sign of FP4's second zero differs by processor: see test_nf4_bitsandbytes.
                assert same_bits(decoded + 0.0, values.detach() + 0.0)
    assert experts == 2 * 4 * 2
    for name, weight in dequantized_weights(quantized):
        with torch.no_grad():
            dense.get_parameter(name).copy_(weight)
    assert torch.allclose(logits(quantized), logits(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_byte(folder: Path, mixtral: Path, kind: str, dropout: float) -> None:
    """Dropout's draws are replayed in backward: the generators stand where they stood."""
    model = nonzero_adapter(adapted(folder if kind == "llama" else mixtral, adapter=replace(ADAPTER, dropout=dropout)))
    results = []
    for changes in (
        {"checkpointing": "none"},
        {"checkpointing": "all"},
        {"checkpointing": 1},  # of two layers
        {"checkpointing": True, "offload_activations": True},
    ):
        torch.manual_seed(7)
        results.append(gradients(model, **changes))
    for other in results[1:]:
        assert_same(results[0], other)
    torch.manual_seed(8)
    redrawn = gradients(model)  # the control: what backward would compute with other draws
    with pytest.raises(AssertionError, match="lora_A") if dropout else contextlib.nullcontext():
        assert_same(results[0], redrawn)


def test_offloading_needs_checkpointing_to_matter_but_is_right_without(folder: Path) -> None:
    model = nonzero_adapter(adapted(folder))
    plain = gradients(model, checkpointing=False)
    assert_same(plain, gradients(model, checkpointing=False, offload_activations=True))


def merging_error(model: Any, merged: Any, dtype: torch.dtype, scale: float) -> float:
    """How far W + s B A in the dtype is from the same in fp64, as a share of what rounding explains: the worst element.

    The update is rounded once, and its sum with the weight once more.
    """
    unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    worst = 0.0
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            a, b = (part["default"].weight.detach().double() for part in (module.lora_A, module.lora_B))
            update = scale * b @ a
            exact = module.base_layer.weight.detach().double() + update
            difference = (merged.get_submodule(name).weight.detach().double() - exact).abs()
            bound = unit * (exact.abs() + 4 * update.abs()) + ADAPTER.rank * 2.0**-24
            worst = max(worst, float((difference / bound).max()))
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_merging_is_off_by_the_dtypes_rounding_only(folder: Path, dtype: torch.dtype, rslora: bool) -> None:
    adapter = replace(ADAPTER, rslora=rslora)
    model = nonzero_adapter(attach_adapter(base_of(folder, "fp32"), adapter, seed=0)).to(dtype)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    scale = adapter.alpha / adapter.rank ** (0.5 if rslora else 1.0)
    assert 0.05 < merging_error(model, merged, dtype, scale) <= 1  # the bound is about what happens, not far above it
    # The controls: the other rule's scale, and a merge that rounds in bf16 or, from there, in float8 on its way.
    assert merging_error(model, merged, dtype, adapter.alpha / adapter.rank ** (1.0 if rslora else 0.5)) > 1
    coarser = torch.float8_e4m3fn if dtype == torch.bfloat16 else torch.bfloat16
    assert merging_error(model, merged.to(coarser).to(dtype), dtype, scale) > 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_saved_adapter_gives_the_same_logits(folder: Path, precision: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = nonzero_adapter(adapted(folder, precision))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of(folder, precision), str(tmp_path))
    assert same_bits(logits(loaded), logits(model))
    assert not torch.equal(logits(nonzero_adapter(loaded, seed=6)), logits(model))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"])
def test_two_runs_with_one_seed_are_one(folder: Path, optimizer: str) -> None:
    config = TrainConfig(optimizer=optimizer, max_steps=3)  # type: ignore[arg-type]  # one of the Literal's values
    results = []
    for _ in range(2):
        model = adapted(folder)
        made = make_optimizer(model.parameters(), config)
        for step in range(3):
            train_step(model, WINDOW, made, config, step=step, total_steps=3)
        results.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    assert_same(*results)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("into", ["quantized-base", "full-base"])
def test_the_merged_model_is_the_one_it_says(
    folder: Path, mixtral: Path, kind: str, precision: str, into: str, tmp_path: Path
) -> None:
    """Into the quantized base: what was trained. Into the full one: the original weights with the adapter on top."""
    from transformers import AutoModelForCausalLM

    if precision == "int8" and (kind == "mixtral" or into == "quantized-base"):
        pytest.skip("int8 rounds activations too: no merged model computes what was trained; experts are refused")
    if precision == "fp32" and into == "quantized-base":
        pytest.skip("refused by validate.py: there is nothing quantized")
    source = folder if kind == "llama" else mixtral
    model = nonzero_adapter(adapted(source, precision))
    model.save_pretrained(tmp_path / "adapter")
    config = RunConfig(
        model=ModelConfig(model=str(source), precision=precision, compute_dtype="fp32", device="cpu"),  # type: ignore[arg-type]  # one of the Literal's values
        adapter=ADAPTER,
        output=OutputConfig(merge=into),  # type: ignore[arg-type]  # one of the Literal's values
    )
    merge(model, tmp_path / "adapter", config, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    trained, original = logits(model), logits(nonzero_adapter(adapted(source, "fp32")))
    expected, other = (trained, original) if into == "quantized-base" else (original, trained)
    assert relative_l2([logits(merged)], [expected]) <= 1e-5
    if precision != "fp32":
        assert relative_l2([logits(merged)], [other]) > 1e-3
