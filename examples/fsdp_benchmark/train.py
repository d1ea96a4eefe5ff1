"""One row of fms-acceleration's benchmark: a few steps of transformers' Trainer over rows of 4,096 tokens.

    python train.py MODEL full|lora|qlora|qlora-kbit ROWS OUTPUT.json

``MODEL`` is a folder with a checkpoint, ``ROWS`` the rows of each card. Started by ``accelerate launch``, the ranks
share the model by FSDP. Rank 0 writes the benchmark's two figures of torch's memory.

Nothing here knows of a dry GPU. The settings are those of the benchmark's ``scenarios.yaml`` and ``defaults.yaml``.
"""

import json
import os
import sys
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.utils.other import fsdp_auto_wrap_policy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

TOKENS, STEPS = 4096, 3
ADDED = 1
"""The benchmark's trainer adds a padding token to the vocabulary."""


def flash_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **_):
    """FlashAttention as torch ships it, with the sizes of the package flash-attn: causal, no mask, grouped queries."""
    wanted = module.q_proj.weight.dtype if query.dtype == torch.float32 else query.dtype
    query, key, value = (
        states.to(wanted if wanted.is_floating_point else torch.bfloat16) for states in (query, key, value)
    )
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        found = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=True
        )
    return found.transpose(1, 2), None


def load(folder, method):
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    settings = {}
    if method.startswith("qlora"):
        storage = {"bnb_4bit_quant_storage": torch.bfloat16} if sharded else {}
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            **storage,
        )
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16, **settings)
    model.config._attn_implementation = "flash_attention_2"
    transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = flash_attention
    model.resize_token_embeddings(model.config.vocab_size + ADDED, mean_resizing=False)
    return model


def adapt(model, method):
    """The model with an adapter, as the benchmark's trainer attaches it."""
    if method == "full":
        return model
    in_parts = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if method == "qlora-kbit" and not in_parts:  # "baseline": TRL has peft cast to fp32 what is not quantized,
        model = prepare_model_for_kbit_training(model)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.to(torch.bfloat16)  # and casts these back, which leaves the norms
    elif method != "lora":
        for parameter in model.parameters():
            parameter.requires_grad = False
    model.enable_input_require_grads()
    layers = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, lora_dropout=0.1, target_modules=layers)
    )


def main():
    folder, method, rows, output = sys.argv[1:5]
    arguments = TrainingArguments(
        "unused",
        per_device_train_batch_size=int(rows),
        max_steps=STEPS,
        gradient_checkpointing=True,
        learning_rate=2e-5,
        weight_decay=0.01,
        adam_epsilon=1e-4,
        bf16=method.startswith("qlora"),
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        skip_memory_metrics=False,
        disable_tqdm=True,
    )
    model = adapt(load(folder, method), method)
    row = {name: [1] * TOKENS for name in ("input_ids", "attention_mask", "labels")}
    trainer = Trainer(model, arguments, train_dataset=[row] * 64)
    if trainer.is_fsdp_enabled and method != "full":
        trainer.accelerator.state.fsdp_plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)
    figures = trainer.train().metrics
    if trainer.is_world_process_zero():
        Path(output).write_text(json.dumps(memory(figures)))


def memory(figures):
    """What ``extract_gpu_memory_metrics`` of the benchmark makes of the Trainer's figures, in bytes.

    ``peak`` is the benchmark's ``mem_peak_torch_mem_alloc_in_bytes``, and ``left``, what is allocated after training,
    its ``mem_torch_mem_alloc_in_bytes``.
    """
    allocated = figures["before_init_mem_gpu"]
    peaks = [allocated]
    for stage in ("init", "train"):
        allocated += figures[f"{stage}_mem_gpu_alloc_delta"]
        peaks.append(allocated + figures[f"{stage}_mem_gpu_peaked_delta"])
    return {"peak": max(peaks), "left": allocated}


if __name__ == "__main__":
    main()
