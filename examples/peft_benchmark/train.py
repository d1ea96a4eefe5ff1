"""A training loop like that of PEFT's method comparison: Llama-3.2-3B in bfloat16, AdamW, sorted batches of 4.

Nothing here knows of a dry GPU. The rows are made up, because only their lengths matter to memory.
"""

import argparse

import torch
from peft import (
    C3AConfig,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

ATTENTION, MLP = ["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]
METHODS = {
    "lora-r32": lambda: LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64),
    "lora-r64": lambda: LoraConfig(task_type="CAUSAL_LM", r=64, lora_alpha=128),
    "lora-r10-mlp": lambda: LoraConfig(task_type="CAUSAL_LM", r=10, lora_alpha=20, target_modules=MLP),
    "dora-r32": lambda: LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64, use_dora=True),
    "c3a": lambda: C3AConfig(block_size=64, target_modules=ATTENTION),
    "fourierft": lambda: FourierFTConfig(n_frequency=1000, scaling=300, target_modules=ATTENTION),
    "ia3": lambda: IA3Config(),
    "ia3-all": lambda: IA3Config(
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", *MLP], feedforward_modules=MLP
    ),
    "ln-tuning": lambda: LNTuningConfig(),
    "loha-r32": lambda: LoHaConfig(r=32, alpha=64, target_modules=ATTENTION),
    "lokr-r32": lambda: LoKrConfig(r=32, alpha=64, decompose_factor=4, target_modules=ATTENTION),
    "oft-r32": lambda: OFTConfig(r=32, oft_block_size=0, target_modules=ATTENTION),
    "vera-r256": lambda: VeraConfig(r=256, d_initial=0.1),
}


def batches(longest):
    """Buckets of 20 batches, long to short, as the benchmark draws them; the longest of all begins the last one."""
    for first in (560, 600, 520):
        for place in range(20):
            yield int(first * (1 - place / 21))
    yield longest


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", choices=METHODS, default="lora-r32")
    parser.add_argument("--longest", type=int, default=700, metavar="TOKENS")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(options.model, device_map="cuda", dtype=torch.bfloat16)
    model = get_peft_model(model, METHODS[options.method]()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    for step, tokens in enumerate(batches(options.longest), start=1):
        ids = torch.randint(0, 1000, (4, tokens))
        mask = (torch.arange(tokens) < torch.tensor([[tokens], [tokens - 2], [tokens - 3], [tokens - 5]])).long()
        batch = {"input_ids": ids.to("cuda"), "attention_mask": mask.to("cuda")}
        labels = ids.masked_fill(mask == 0, -100).to("cuda")
        optimizer.zero_grad()
        outputs = model(**batch, labels=labels, num_items_in_batch=batch["attention_mask"].sum().item())
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        outputs.loss.item()
        if step % 10 == 0:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
