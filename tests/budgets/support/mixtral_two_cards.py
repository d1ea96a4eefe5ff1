"""A LoRA step on Mixtral-8x7B in half precision, its layers spread over the cards that are there by transformers.

Run beneath ``python -m pytest_vram run --gpu a100-80 --count 2``.
"""

from __future__ import annotations

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from finetune.model.shapes import load_shape
from pytest_vram.drygpu import empty_checkpoint

SEQ = 2048


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = empty_checkpoint(load_shape("mixtral-8x7b"), folder, dtype="bfloat16")
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, device_map="balanced")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ids = torch.arange(SEQ, device="cuda:0")[None]
    for _ in range(2):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
