"""A training loop like that of PEFT's method comparison: Llama-3.2-3B in bfloat16, AdamW, sorted batches of 4.

Nothing here knows of a dry GPU. The rows are made up, because only their lengths matter to memory.
"""

import argparse
import json
import random
from pathlib import Path

import peft
import peft.optimizers
import torch
from transformers import AutoModelForCausalLM

ATTENTION, MLP = ["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]
METHODS = {
    "full": None,
    "lora-r32": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64),
    "lora-r64": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=64, lora_alpha=128),
    "lora-r10-mlp": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=10, lora_alpha=20, target_modules=MLP),
    "dora-r32": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64, use_dora=True),
    "adalora-r64": lambda: peft.AdaLoraConfig(init_r=64, target_r=32, total_step=5000, tinit=200, tfinal=500),
    "c3a": lambda: peft.C3AConfig(block_size=64, target_modules=ATTENTION),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=1000, scaling=300, target_modules=ATTENTION),
    "hira-r32": lambda: peft.HiraConfig(r=32, target_modules=ATTENTION),
    "ia3": lambda: peft.IA3Config(),
    "ia3-all": lambda: peft.IA3Config(
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", *MLP], feedforward_modules=MLP
    ),
    "ln-tuning": lambda: peft.LNTuningConfig(),
    "loha-r32": lambda: peft.LoHaConfig(r=32, alpha=64, target_modules=ATTENTION),
    "lokr-r32": lambda: peft.LoKrConfig(r=32, alpha=64, decompose_factor=4, target_modules=ATTENTION),
    "oft-r32": lambda: peft.OFTConfig(r=32, oft_block_size=0, target_modules=ATTENTION),
    "vera-r256": lambda: peft.VeraConfig(r=256, d_initial=0.1),
}


def batches(longest):
    """Tokens of the longest row of each batch, as the benchmark draws them.

    Rows of 209 tokens on average, sorted long to short within buckets of 20 batches of 4.
    """
    draw = random.Random(0)
    for _ in range(3):
        rows = sorted((min(int(draw.lognormvariate(5.268, 0.38)), longest) for _ in range(80)), reverse=True)
        yield from rows[::4]
    yield longest


def chosen(options):
    """The adapter's configuration (None for a full fine-tune), and the optimizer's settings."""
    if options.experiment is None:
        make = METHODS[options.method]
        return make and make(), {}
    training = options.experiment / "training_params.json"
    settings = json.loads(training.read_text()) if training.exists() else {}
    adapter = (options.experiment / "adapter_config.json").exists()
    return peft.PeftConfig.from_pretrained(options.experiment) if adapter else None, settings


def make_optimizer(model, settings):
    values = settings.get("optimizer_kwargs", {"lr": 1e-4, "weight_decay": 0.1})
    kind = settings.get("optimizer_type", "AdamW")
    if kind == "lora-fa":
        return peft.optimizers.create_lorafa_optimizer(model, **values)
    if kind == "riemannian":
        return peft.optimizers.create_riemannian_optimizer(model, optimizer_cls=torch.optim.AdamW, **values)
    return getattr(torch.optim, kind)(model.parameters(), **values)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", choices=METHODS, default="lora-r32")
    parser.add_argument("--experiment", type=Path, help="a folder of the benchmark's own, instead of a method")
    parser.add_argument("--longest", type=int, default=695, metavar="TOKENS")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(options.model, device_map="cuda", dtype=torch.bfloat16)
    config, settings = chosen(options)
    if config is not None:
        in_fp32 = settings.get("autocast_adapter_dtype", True)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=in_fp32)
    optimizer = make_optimizer(model, settings)
    if config is not None:  # the benchmark evaluates the base first; what trains may be another set afterwards
        with model.eval().disable_adapter(), torch.inference_mode():
            model(torch.randint(0, 1000, (4, 768), device="cuda"))
    model.train()
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
        if hasattr(getattr(model, "base_model", None), "update_and_allocate"):
            model.base_model.update_and_allocate(step)
        outputs.loss.item()
        if step % 10 == 0:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
