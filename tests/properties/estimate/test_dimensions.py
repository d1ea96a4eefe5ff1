"""The arithmetic's sizes are those of the model that transformers makes of the same fields, for any fields."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.estimate.dimensions import Dimensions

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "gemma2", "phi3")


@st.composite
def fields(draw: st.DrawFn) -> dict[str, Any]:
    family = draw(st.sampled_from(FAMILIES))
    heads, shared = draw(st.sampled_from([2, 4])), draw(st.sampled_from([1, 2]))
    found = {
        "model_type": family,
        "vocab_size": draw(st.integers(8, 64)),
        "hidden_size": heads * draw(st.sampled_from([8, 16])),
        "intermediate_size": draw(st.integers(8, 64)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads // shared,
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": 0,
    }
    if family in ("llama", "gemma2"):
        found["attention_bias"] = draw(st.booleans())
    if family in ("llama", "mistral", "mixtral", "gemma2"):
        found["head_dim"] = draw(st.sampled_from([8, 32]))
    if family == "mixtral":
        found |= {"num_local_experts": draw(st.integers(2, 5)), "num_experts_per_tok": 2}
    return found


@given(chosen=fields())
@settings(max_examples=settings.default.max_examples)
def test_every_parameter_of_the_model(chosen: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    rest = {name: value for name, value in chosen.items() if name != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(chosen["model_type"], **rest))
    dims = Dimensions.of(chosen)
    assert dims.parameters == model.num_parameters()
    matrices = {
        name: p[0].numel() if p.dim() == 3 else p.numel()  # of a mixture's experts, one
        for name, p in model.named_parameters()
        if ".layers." in name and p.dim() > 1 and not name.endswith(".gate.weight")  # the router is not quantized
    }
    assert dims.largest_matrix == max(matrices.values())
