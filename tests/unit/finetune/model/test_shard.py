"""What a sharded base is refused for, and how its 4-bit layers compute."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from finetune.config.settings import ModelConfig
from finetune.errors import ConfigError
from finetune.model.load import load_base

bnb = pytest.importorskip("bitsandbytes")

if TYPE_CHECKING:
    from pathlib import Path


def four_bits(*, bias: bool = False, double_quant: bool = True) -> Any:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 64, bias=bias, compute_dtype=torch.float32)
    packed, state = bnb.functional.quantize_4bit(
        torch.randn(64, 128), compress_statistics=double_quant, quant_type="nf4"
    )
    layer.weight = nn.Parameter(packed, requires_grad=False)
    layer.weight.quant_state = state
    return layer


def test_a_quantized_folder_is_refused_before_it_is_read(tmp_path: Path) -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": stored}))
    with pytest.raises(ConfigError, match="would be loaded whole on every card"):
        load_base(ModelConfig(model=str(tmp_path), device="cpu", shard=True))


@pytest.mark.parametrize("outside", [True, False])
def test_a_quantized_weight_that_no_layer_gathers_is_refused(outside: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from finetune.model.shard import shard_base

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_key_value_heads=1, **sizes))
    if outside:
        model.model.layers[0].mlp.up_proj = four_bits()
        model.vision = four_bits()
    with pytest.raises(ConfigError, match="belong to no layer of its decoder"):
        shard_base(model)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_layer_with_its_scales_apart_computes_the_same(bias: bool, double_quant: bool) -> None:
    from finetune.patches.bitsandbytes import SCALES, SCALES_OF_SCALES, gather_scales

    layer = four_bits(bias=bias, double_quant=double_quant)
    layer.support_avx512bf16_for_cpu = False
    x = torch.randn(3, 128)
    expected, state = layer(x), layer.weight.quant_state
    gather_scales(layer)
    layer.register_parameter(SCALES, nn.Parameter(state.absmax, requires_grad=False))
    if double_quant:
        layer.register_parameter(SCALES_OF_SCALES, nn.Parameter(state.state2.absmax, requires_grad=False))
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert torch.equal(layer(x), expected)


def test_an_adapter_over_a_sharded_layer_is_not_fused() -> None:
    from peft import LoraConfig, get_peft_model

    from finetune.kernels.fused_adapter import fuse
    from finetune.patches.bitsandbytes import gather_scales

    model = get_peft_model(nn.Sequential(four_bits()), LoraConfig(r=2, target_modules=["0"]))
    assert fuse(model).fused == 1
    again = get_peft_model(nn.Sequential(four_bits()), LoraConfig(r=2, target_modules=["0"]))
    gather_scales(again.base_model.model[0].base_layer)
    assert str(fuse(again)) == (
        "0 of 1 adapted layers are fused with their base; 1 are not, because their base is sharded over the ranks"
    )
