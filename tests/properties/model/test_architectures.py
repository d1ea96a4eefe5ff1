"""Loss and gradient of many architectures are the model's own, split, padded and packed; or they are refused."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from every_causal_lm import tiny_model_of
from tiny_models import IGNORED, PAD, WORDS, make_rows, packed, padded, relative_l2, targets_of

from finetune.config.settings import ModelConfig, TrainConfig
from finetune.data.batches import Batch
from finetune.errors import ConfigError, ModelError
from finetune.kernels.packed_attention import keep_rows_apart
from finetune.model.checks import check_assumptions, why_rows_mix
from finetune.model.forward import decoder_of, hidden_states
from finetune.model.load import load_base
from finetune.model.loss import LogitRule
from finetune.training.accumulate import window_gradients

if TYPE_CHECKING:
    from pathlib import Path

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_local_experts", "num_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "head_dim": 16,
    "rotary_dim": 8,
    "logits_scaling": 8.0,
    "vocab_size": WORDS,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
APART = (
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2"),
    *("gpt_neox", "gptj", "cohere", "cohere2", "granite", "olmo2", "stablelm", "starcoder2", "smollm3", "glm4"),
    "mixtral",
)
"""Rows that share a sequence are kept apart."""
TOGETHER = ("opt", "xglm", "bloom", "mpt", "gpt_oss", "recurrent_gemma")
"""They are not, or their positions go on."""
STILL_TOGETHER = ("xglm", "bloom", "mpt", "recurrent_gemma")
"""They are not either where attention is told which tokens share a row."""
ROWS = make_rows([12, 9, 15], seed=2)


def tiny(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    default = AutoConfig.for_model(kind)
    config = AutoConfig.for_model(kind, **{name: size for name, size in SIZES.items() if hasattr(default, name)})
    for name in vars(config):
        if "dropout" in name or name.endswith("pdrop"):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
        head = model.get_output_embeddings().weight
        head.mul_(8.0 / float(head.norm(dim=1).mean()))  # logits as large as those that a cap is for
    return model


def of_the_model_itself(model: Any) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradient as ``model(labels=...)`` has them, each row alone, weighted by its targets."""
    model.train()
    loss = 0.0
    for ids, labels in ROWS:
        wanted = torch.tensor([[IGNORED, *labels[1:]]])
        share = int((wanted != IGNORED).sum()) / targets_of(ROWS)
        part = model(input_ids=torch.tensor([ids]), labels=wanted, use_cache=False).loss * share
        part.backward()
        loss += float(part.detach())
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return loss, grads


def off(model: Any, batches: list[Any], loss: float, grads: list[torch.Tensor], **changes: Any) -> float:
    stats = window_gradients(model, batches, TrainConfig(loss_chunk=7, **changes))
    found = relative_l2([p.grad for p in model.parameters()], grads)
    model.zero_grad(set_to_none=True)
    return max(found, abs(stats.loss - loss) / loss)


@pytest.mark.parametrize("kind", [*APART, *TOGETHER])
def test_loss_and_gradient_are_the_models_own(kind: str) -> None:
    model = tiny(kind)
    loss, grads = of_the_model_itself(model)
    split = [padded(ROWS[:2], extra=3), padded(ROWS[2:])]
    assert off(model, split, loss, grads, checkpointing=False) <= 1e-5
    assert off(model, split, loss, grads, checkpointing=True) <= 1e-5
    check_assumptions(model, packing=False)
    apart = off(model, [packed(ROWS)], loss, grads, checkpointing=False)
    if kind in APART:
        check_assumptions(model, packing=True)
        assert apart <= 1e-5
    else:
        with pytest.raises(ConfigError, match=rf"packing.*{kind} model does not keep rows apart.*--no-packing"):
            check_assumptions(model, packing=True)
        assert apart > 1e-3  # not refused for nothing
    keep_rows_apart(model)  # attention may keep rows apart where no mask does
    if why_rows_mix(model) is None:
        assert off(model, [packed(ROWS)], loss, grads, checkpointing=True) <= 1e-5
    else:
        assert kind in STILL_TOGETHER


@pytest.mark.parametrize("kind", [*APART, *TOGETHER])
def test_rows_that_mix_are_found_in_16_bits(kind: str) -> None:
    """The difference is smaller there than what a row alone may differ by, because other kernels round differently."""
    model = tiny(kind).to(torch.bfloat16)
    assert (why_rows_mix(model) is None) == (kind in APART)
    keep_rows_apart(model)
    assert (why_rows_mix(model) is None) == (kind not in STILL_TOGETHER)


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite", "recurrent_gemma"])
def test_a_rule_for_logits_that_is_not_known_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(kind)
    monkeypatch.setattr(LogitRule, "of", classmethod(lambda cls, _: cls()))
    with pytest.raises(ModelError, match=f"logits of this {kind} model.*cannot be trained"):
        check_assumptions(model, packing=False)


def test_checking_leaves_the_model_and_the_generators_as_they_were() -> None:
    model = tiny("llama").train()
    model.model.layers[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    check_assumptions(model, packing=True)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("precision", "compute"),
    [("nf4", "bf16"), ("int8", "bf16"), ("int8", "fp32"), ("bf16", "bf16"), ("fp32", "bf16"), ("fp16", "fp16")],
)
@pytest.mark.parametrize(("kind", "apart"), [("llama", True), ("opt", False)])
def test_rounding_is_not_taken_for_rows_that_see_each_other(
    kind: str, apart: bool, precision: str, compute: str, tmp_path: Path
) -> None:
    made = tiny(kind)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "input_layernorm" in name:
                parameter.mul_(4.0)  # values above 6, for which LLM.int8() takes a whole column in 16 bits
    made.save_pretrained(tmp_path)
    model = load_base(ModelConfig(model=str(tmp_path), precision=precision, compute_dtype=compute, device="cpu"))  # type: ignore[arg-type]  # one of the Literal's values
    with contextlib.nullcontext() if apart else pytest.raises(ConfigError, match="keep rows apart"):
        check_assumptions(model, packing=True)
    assert {m.state.threshold for m in model.modules() if hasattr(m, "init_8bit_state")} <= {6.0}


def test_positions_that_go_on_are_refused_though_no_row_sees_another() -> None:
    model = tiny("gpt2")

    def going_on(_: Any, arguments: tuple[Any, ...], given: dict[str, Any]) -> Any:
        length = (arguments[0] if arguments else given["input_ids"]).shape[1]
        row = torch.arange(length) // 12
        causal = torch.ones(length, length, dtype=torch.bool).tril() & (row[:, None] == row[None])
        return arguments, given | {"position_ids": torch.arange(length)[None], "attention_mask": causal[None, None]}

    model.get_decoder().register_forward_pre_hook(going_on, with_kwargs=True)
    with pytest.raises(ConfigError, match="keep rows apart"):
        check_assumptions(model, packing=True)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_model_that_sees_the_tokens_after_is_refused(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    for causal in (False, True):
        torch.manual_seed(0)
        sizes = {
            name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        }
        config = AutoConfig.for_model(kind, is_decoder=causal, intermediate_size=128, **sizes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with (
            contextlib.nullcontext()
            if causal
            else pytest.raises(ModelError, match=rf"{kind} model sees the tokens after")
        ):
            check_assumptions(model, packing=False)


@pytest.mark.parametrize("kind", ["openai-gpt", "xlnet"])
def test_a_model_without_checkpointing_is_told_to_do_without(kind: str) -> None:
    model = tiny_model_of(kind)
    with pytest.raises(ConfigError, match=rf"checkpointing = True: .*{kind} model; use --no-checkpointing"):
        check_assumptions(model, packing=False, checkpointing=True)


def test_looking_for_checkpointing_leaves_it_off() -> None:
    model = tiny("llama")
    check_assumptions(model, packing=False, checkpointing=True)
    assert not model.is_activation_checkpointing


@pytest.mark.parametrize("kind", ["mamba2", "qwen3_next", "falcon_h1"])
def test_packing_where_rows_mix_or_the_model_fails_is_refused_in_a_line(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"packing = True: this {kind} model .*use --no-packing"):
        check_assumptions(tiny_model_of(kind), packing=True)


def test_a_model_that_fails_on_packed_rows_is_refused_and_not_traced() -> None:
    model = tiny("llama")

    def failing(_: Any, arguments: tuple[Any, ...], given: dict[str, Any]) -> None:
        if given.get("position_ids") is not None:
            raise IndexError("too many indices for tensor of dimension 2")

    model.get_decoder().register_forward_pre_hook(failing, with_kwargs=True)
    with pytest.raises(ConfigError, match=r"fails on rows that share a sequence \(IndexError\); use --no-packing"):
        check_assumptions(model, packing=True)


@pytest.mark.parametrize("kind", ["modernbert-decoder", "llama4_text", "roberta"])
def test_what_the_head_reads_is_found_where_no_module_returns_it(kind: str) -> None:
    model = tiny_model_of(kind).eval()
    assert decoder_of(model) is None
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        states = hidden_states(model, Batch(input_ids=ids, labels=ids)).states
        logits = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(model.get_output_embeddings()(states), logits)
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert decoder_of(tiny("llama")) is not None
