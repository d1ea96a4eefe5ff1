"""The chunked loss and its gradient against transformers' own, for models that treat their logits differently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.config.settings import TrainConfig
from finetune.data.batches import Batch
from finetune.model.loss import LogitRule, chunked_cross_entropy, target_positions
from finetune.training.accumulate import window_gradients

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
INKLING = SIZES | {
    "logits_mup_width_multiplier": 3.0,
    "unpadded_vocab_size": 91,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 4,
    "rel_extent": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": SIZES,
    "mixtral": SIZES | {"num_local_experts": 4},
    "qwen2": SIZES,
    "phi": SIZES,  # a head with a bias
    "phi3": SIZES,
    "gpt2": GPT2 | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gemma2": SIZES | {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "cohere": SIZES | {"logit_scale": 0.25},
    "granite": SIZES | {"logits_scaling": 3.0},
    "inkling_text": INKLING,  # divides the input of the head, and has rows of the head that are no words
}


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradient_are_those_of_transformers(kind: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, attention_dropout=0.0, **MODELS[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)  # far from the zero logits of fresh weights
    ids = torch.randint(3, 90, (2, 12))
    labels = ids.clone()
    labels[0, :5] = -100
    theirs = model(input_ids=ids, labels=labels, use_cache=False).loss
    theirs.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    stats = window_gradients(model, [Batch(input_ids=ids, labels=labels)], TrainConfig(loss_chunk=4))
    assert stats.loss == pytest.approx(float(theirs.detach()), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(scale=0.5), LogitRule(softcap=3.0, scale=2.0, words=29)])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_any_chunk_gives_one_loss_and_one_gradient(rule: LogitRule, chunk: int) -> None:
    torch.manual_seed(1)
    head = nn.Linear(8, 31).double()
    hidden = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 29, (7,))
    expected = F.cross_entropy(rule.apply(head(hidden)), targets, reduction="sum") / 7
    wanted = torch.autograd.grad(expected, [hidden, head.weight, head.bias])
    loss = chunked_cross_entropy(hidden, head, targets, unit=1 / 7, chunk=chunk, rule=rule)
    found = torch.autograd.grad(loss, [hidden, head.weight, head.bias])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_a_head_that_is_no_plain_linear_layer_is_used_as_it_is() -> None:
    torch.manual_seed(2)
    plain = nn.Linear(8, 31, bias=False)
    hidden = torch.randn(9, 8, requires_grad=True)
    targets = torch.randint(0, 31, (9,))
    (expected,) = torch.autograd.grad(chunked_cross_entropy(hidden, plain, targets, chunk=4), hidden)
    (found,) = torch.autograd.grad(chunked_cross_entropy(hidden, nn.Sequential(plain), targets, chunk=4), hidden)
    torch.testing.assert_close(found, expected)


def test_the_loss_of_bf16_hidden_states_is_reduced_in_fp32() -> None:
    torch.manual_seed(3)
    head = nn.Linear(16, 200, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(64, 16, dtype=torch.bfloat16)
    targets = torch.randint(0, 200, (64,))
    expected = F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    loss = chunked_cross_entropy(hidden, head, targets, chunk=5)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_nothing_to_predict_is_a_loss_of_zero() -> None:
    hidden = torch.zeros(0, 8, requires_grad=True)
    assert chunked_cross_entropy(hidden, nn.Linear(8, 31), torch.zeros(0, dtype=torch.int64)).item() == 0.0


def test_a_target_belongs_to_the_position_before_it() -> None:
    positions, targets = target_positions(torch.tensor([[7, -100, 9, 4], [-100, 5, -100, -100]]))
    assert positions.tolist() == [1, 2, 4]
    assert targets.tolist() == [9, 4, 5]


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"logit_scale": 0.25}, LogitRule(scale=0.25)),
        ({"logits_scaling": 8.0}, LogitRule(scale=0.125)),
        ({"lm_head_multiplier": 0.02}, LogitRule(scale=0.02)),  # Falcon-H1
        ({"final_logit_softcapping": 30.0}, LogitRule(softcap=30.0)),
        ({"logits_mup_width_multiplier": 4.0, "unpadded_vocab_size": 90}, LogitRule(scale=0.25, words=90)),  # Inkling
        ({"logit_scale": None, "final_logit_softcapping": None}, LogitRule()),
    ],
)
def test_the_rule_is_read_off_the_configuration(settings: dict[str, Any], rule: LogitRule) -> None:
    from transformers import LlamaConfig

    assert LogitRule.of(LlamaConfig(**settings)) == rule
