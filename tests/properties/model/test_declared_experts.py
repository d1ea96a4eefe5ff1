"""Every mixture computes in 4 bits what its own code computes with the decoded weights, declared or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from every_causal_lm import tiny_model_of

from finetune.config.settings import AdapterConfig, ModelConfig
from finetune.errors import ModelError
from finetune.model import parts
from finetune.model.experts import QuantizedExperts
from finetune.model.load import attach_adapter, load_base
from finetune.model.merge import dequantized_weights

if TYPE_CHECKING:
    from pathlib import Path

DECLARED = ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v4", "qwen3_next", "granitemoehybrid", "lfm2_moe"]
"""Gated, transposed with biases, without a gate, with a clamped gate, and beside convolutions and state spaces."""


def based(folder: Path, precision: str) -> Any:
    return load_base(
        ModelConfig(model=str(folder), precision=precision, compute_dtype="fp32", device="cpu")  # type: ignore[arg-type]  # one of the Literal's values
    )


@pytest.mark.parametrize("kind", DECLARED)
def test_it_computes_what_the_model_does_with_the_decoded_weights(kind: str, tmp_path: Path) -> None:
    made = tiny_model_of(kind)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("_proj_bias"):
                parameter.normal_(std=0.5)
    made.save_pretrained(tmp_path)
    quantized, dense = based(tmp_path, "nf4"), based(tmp_path, "fp32")
    experts = [name for name, module in quantized.named_modules() if isinstance(module, QuantizedExperts)]
    assert experts
    with torch.no_grad():
        for name, weight in dequantized_weights(quantized):
            dense.get_parameter(name).copy_(weight)
        for name in experts:
            ours, theirs = quantized.get_submodule(name), dense.get_submodule(name)
            states = torch.randn(11, theirs.down_proj.shape[2 if theirs.is_transposed else 1]) * 5
            index = torch.stack([torch.randperm(ours.num_experts)[:2] for _ in range(11)])
            weights = torch.rand(11, 2)
            torch.testing.assert_close(
                ours(states, index, weights), theirs(states, index, weights), rtol=1e-4, atol=1e-5
            )
        ids = torch.arange(1, 13)[None]
        torch.testing.assert_close(quantized(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["dbrx", "inkling_text", "jetmoe", "llama4_text", "longcat_flash"])
def test_experts_in_a_form_of_their_own_run_their_code_on_packed_weights(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model_of(kind).save_pretrained(tmp_path)
    quantized, dense = based(tmp_path, "nf4"), based(tmp_path, "fp32")
    # The experts' large parameters, all of which are bytes now; a router's table of biases stays as it is.
    large = {name: p for name, p in quantized.named_parameters() if "experts" in name and p.numel() > 4096}
    assert large
    assert all(parameter.dtype == torch.uint8 for parameter in large.values())
    with torch.no_grad():
        decoded = {name: dense.get_parameter(name).copy_(weight) for name, weight in dequantized_weights(quantized)}
    assert large.keys() <= decoded.keys()
    found = []
    for model in (quantized, dense):
        embedded = model.get_input_embeddings()(torch.arange(1, 13)[None]).requires_grad_()
        logits = model(inputs_embeds=embedded).logits
        found.append((logits.detach(), *torch.autograd.grad(logits.square().sum(), embedded)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    with pytest.raises(ModelError, match=rf"experts of this {kind} model cannot be stored in 8 bits"):
        based(tmp_path, "int8")
    monkeypatch.setattr(parts, "wanted", lambda: True)
    with pytest.raises(ModelError, match=r"shard: the experts in .* run code of their own.*--no-shard"):
        based(tmp_path, "nf4")


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_rwkv_computes_with_the_same_weights_in_evaluation_mode(precision: str, tmp_path: Path) -> None:
    made = tiny_model_of("rwkv")
    made.config.rescale_every = 1
    made.save_pretrained(tmp_path)
    model: Any = attach_adapter(based(tmp_path, precision), AdapterConfig(rank=4), seed=0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        trained, evaluated = (model.train(mode)(input_ids=ids).logits for mode in (True, False))
    torch.testing.assert_close(trained, evaluated)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("kind", ["mamba2", "lfm2", "falcon_h1", "recurrent_gemma", "qwen3_5_text", "bamba"])
@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_convolution_keeps_no_model_from_being_quantized(kind: str, precision: str, tmp_path: Path) -> None:
    tiny_model_of(kind).save_pretrained(tmp_path)
    model = based(tmp_path, precision)
    assert any(type(parameter).__name__ in ("Params4bit", "Int8Params") for parameter in model.parameters())
