"""A tiny model of every causal language model that transformers has, and one training step of it."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import IGNORED, make_rows, padded, targets_of

WORDS = 256
WARM = "finetune.training.step"
"""Is imported by the first step."""
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width", "embedding_size"), 64),
    **dict.fromkeys(("dim_model", "emb_dim", "attention_hidden_size", "hidden_dim", "dim", "mamba_d_ssm"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_inner", "dim_ff", "dff"), 128),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "block_ff_dim", "intermediate_size_mlp"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 64),
    **dict.fromkeys(("shared_intermediate_size", "ffn_intermediate_size", "mlp_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_encoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_encoder_attention_heads", "num_global_key_value_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "linear_num_key_heads"), 4),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_k", "topk", "top_k_experts"), 2),
    **dict.fromkeys(("num_experts_per_token",), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "n_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions"), 128),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim", "global_head_dim"), 16),
    "linear_head_dim": 64,
    "linear_num_heads": 2,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "gated_norm_rank"), 64),
    **dict.fromkeys(("ssm_state_size", "state_size", "mamba_d_state", "d_state"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size"), WORDS),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "mlp_layer_types_first"), 1),
    **dict.fromkeys(("num_nextn_predict_layers", "num_kv_shared_layers", "num_mtp_layers"), 0),
    "hidden_size_per_layer_input": 64,
    "rotary_dim": 8,
    "sliding_window": 32,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
    "mamba_d_head": 32,
    "mamba_expand": 2,
    "expand": 2,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}
"""Sizes by the names that configurations have for them. Layers are 64 inputs wide or 128, as 4 bits on a CPU need."""
_OWN: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "opt": {"word_embed_proj_dim": 64},
    "bailing_hybrid": {
        "n_group": 1,
        "topk_group": 1,
        "num_experts": 4,
        "layer_group_size": 2,
        "num_experts_per_tok": 2,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_output_size": 64},
    "dots3_note_text": {
        **{f"swa_num_{kind}_heads": 4 for kind in ("attention", "key_value")},
        **{f"swa_{name}": 64 for name in ("q_lora_rank", "kv_lora_rank")},
        **{f"swa_{name}": 16 for name in ("qk_nope_head_dim", "v_head_dim")},
        "swa_head_dim": 32,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "kimi_linear": {"num_experts_per_tok": 2},
    "mimo_v2_flash": {"head_dim": 32, "v_head_dim": 32, "num_key_value_heads": 2, "partial_rotary_factor": 0.5},
    "mpt": {"max_seq_len": 128},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention"]},
    "zamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_ngroups": 1,
        "adapter_rank": 64,
    },
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "xmod": {"default_language": "en_XX", "adapter_reduction_factor": 1},
    "smollm3": {"no_rope_layers": [1, 0]},
    "llama4_text": {"interleave_moe_layer_step": 2, "no_rope_layers": [1, 0], "moe_layers": [1]},
    "blt_local_encoder": {"hidden_size_global": 64},
    "blt_local_decoder": {"hidden_size_global": 64},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "gemma3n_text": {"altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [128, 128]},
}
"""What a configuration needs beside: fields that have to fit each other."""
_DRAFTS = "drafts tokens for another model and starts from that model's states, so that text alone cannot train it"
_SOUNDS = "predicts codes of sound and no text, and transformers cannot build it from its own configuration"
_WHY = {
    "gemma3n": "its vision tower needs timm (`pip install timm`), with which it trains in bf16 and in NF4",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "musicgen": _SOUNDS,
    "musicgen_melody": _SOUNDS,
}
"""Why a model cannot be made here, where transformers' own message does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one architecture in one precision."""

    state: str
    """``trains``, ``refused`` (with a message), ``not made``, ``no answer`` in time, or a defect: ``differs``,
    ``crashes``."""
    detail: str = ""
    packs: bool = False
    checkpointing: bool = True
    adapted: tuple[str, ...] = ()


def kinds() -> list[str]:
    """Every ``model_type`` that ``AutoModelForCausalLM`` knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config_of(kind: str) -> Any:
    """A configuration of ``kind`` with two layers of 64."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[kind]
    return _shrunk(cls, kind)


def _shrunk(cls: Any, kind: str) -> Any:
    from transformers import PreTrainedConfig

    default = cls()
    settings: dict[str, Any] = {}
    parts = getattr(cls, "sub_configs", {}) or {}
    for name in parts:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            settings[name] = _shrunk(type(part), part.model_type).to_dict()
    for name, value in default.to_dict().items():
        if name in settings or isinstance(value, dict):
            continue
        if name in _SIZES and (value is not None or name in ("head_dim", "num_key_value_heads")):
            settings[name] = _SIZES[name]
        elif isinstance(value, (int, float)) and ("dropout" in name or name.endswith(("pdrop", "_drop"))):
            settings[name] = type(value)(0)
    settings |= _OWN.get(kind, {})
    layers = settings.get("num_hidden_layers", 2)
    for name, value in default.to_dict().items():
        if (
            isinstance(value, list)
            and len(value) > layers
            and name not in _OWN.get(kind, {})
            and name.endswith(("types", "type", "layers", "pattern"))
        ):
            settings[name] = _two(value) if layers == 2 else value[:layers]
    return cls(**settings)


def _two(values: list[Any]) -> list[Any]:
    """Two layers' values, of different kinds where there are such."""
    other = next((value for value in values if value != values[0]), values[-1])
    return [values[0], other]


def tiny_model_of(kind: str) -> Any:
    """The model, its weights large enough that its logits differ."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config_of(kind), dtype=torch.float32)


def outcomes(kind: str, precisions: tuple[str, ...] = ("bf16", "nf4")) -> dict[str, Outcome]:
    """Take one step of ``kind`` in each precision, and hold its loss against the model's own."""
    from finetune.errors import FinetuneError

    with tempfile.TemporaryDirectory() as folder:
        try:
            model = tiny_model_of(kind)
            size = sum(parameter.numel() for parameter in model.parameters())
            if size > 30e6:
                raise ValueError(f"{size / 1e6:.0f} million parameters: {_largest(model)}")
            with torch.no_grad():
                model.eval()(input_ids=torch.arange(3, 15)[None], use_cache=False)
            model.save_pretrained(folder)
            if model.config.model_type not in kinds():
                tiny_config_of(kind).save_pretrained(folder)  # the whole's, of which the model is a part
        except Exception as error:  # whatever transformers raises
            return dict.fromkeys(precisions, Outcome(state="not made", detail=_WHY.get(kind) or _said(error)))
        found = {}
        for precision in precisions:
            try:
                found[precision] = _step(Path(folder), precision)
            except FinetuneError as error:
                found[precision] = Outcome(state="refused", detail=str(error))
            except Exception as error:
                found[precision] = Outcome(state="crashes", detail=_said(error))
    return found


def _step(folder: Path, precision: str) -> Outcome:
    from finetune.config.settings import AdapterConfig, ModelConfig, TrainConfig
    from finetune.errors import ConfigError
    from finetune.model.checks import check_assumptions
    from finetune.model.load import attach_adapter, load_base
    from finetune.model.targets import coverage
    from finetune.training.accumulate import window_gradients
    from finetune.training.loop import require_gradients
    from finetune.training.optim import make_optimizer
    from finetune.training.step import train_step

    base = load_base(ModelConfig(model=str(folder), precision=precision, device="cpu"))  # type: ignore[arg-type]  # one of the Literal's values
    adapter = AdapterConfig(rank=4, alpha=8.0)
    model: Any = attach_adapter(base, adapter, seed=0)
    train = TrainConfig(optimizer="adamw", micro_batch=2, accumulation=2, loss_chunk=7, warmup_steps=0)
    try:
        check_assumptions(model, packing=False, checkpointing=True)
    except ConfigError as error:
        if error.problems[0].field != "checkpointing":
            raise
        train = dataclasses.replace(train, checkpointing=False)
        check_assumptions(model, packing=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    rows = make_rows([12, 7, 9], seed=1)
    window = [padded(rows[:2]), padded(rows[2:])]
    expected = _own_loss(model, rows)
    model.train()
    stats = window_gradients(model, window, train)
    require_gradients(model, loss=stats.loss)
    optimizer = make_optimizer(model.parameters(), train)
    before = [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]
    optimizer.zero_grad(set_to_none=True)
    loss = train_step(model, window, optimizer, train, step=0, total_steps=4).loss
    after = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moved = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    adapted = coverage(model, adapter).lines()
    facts: dict[str, Any] = {
        "adapted": adapted,
        "checkpointing": train.checkpointing is not False,
        "packs": _packs(model),
    }
    close = 2e-2 if precision == "bf16" else 2e-4
    if not abs(loss - expected) <= close * expected:
        return Outcome(state="differs", detail=f"loss {loss:.5f}, the model's own {expected:.5f}", **facts)
    if not moved:
        return Outcome(state="differs", detail="no weight of the adapter moved", **facts)
    return Outcome(state="trains", **facts)


def _packs(model: Any) -> bool:
    from finetune.errors import FinetuneError
    from finetune.kernels.packed_attention import keep_rows_apart
    from finetune.model.checks import check_assumptions

    keep_rows_apart(model)
    try:
        check_assumptions(model, packing=True)
    except FinetuneError:
        return False
    return True


@torch.no_grad()
def _own_loss(model: Any, rows: Any) -> float:
    """The loss of the model's own logits, each row alone, weighted by its targets.

    Not ``model(labels=...).loss``: BART's kin do not shift the labels, and predict the token that they read.
    """
    model.eval()
    total = 0.0
    for ids, labels in rows:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        total += float(F.cross_entropy(logits.float(), torch.tensor(labels[1:]), ignore_index=IGNORED, reduction="sum"))
    return total / targets_of(rows)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _largest(model: Any) -> str:
    name, parameter = max(model.named_parameters(), key=lambda pair: pair[1].numel())
    return f"{name} {tuple(parameter.shape)}"
