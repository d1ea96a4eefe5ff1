"""The same QLoRA steps through transformers' Trainer + peft and through finetune, on the CPU, side by side.

    python benchmarks/trainer_comparison.py [--steps 6] [--threads 1] [--no-checkpointing]

Same model (SmolLM2-135M-Instruct, NF4 + double quantization), adapter (rank 8, all linear layers, same seed), rows in
the same order in the same micro-batches, schedule, optimizer (torch's AdamW), clip and dtype (fp32). Each side is a
process of its own. The losses, printed side by side, show that it is the same work; the first step, in which memory is
found and caches are filled, is left out of the speed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

WARM_UP = 1
MIB = 2**20


class Clock:
    """Wall and CPU seconds of each step; the second does not change with what else the machine does."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def begin(self) -> None:
        self._begin = time.perf_counter(), time.process_time()

    def end(self) -> None:
        self.wall.append(time.perf_counter() - self._begin[0])
        self.cpu.append(time.process_time() - self._begin[1])


def config_of(arguments: argparse.Namespace) -> Any:
    from finetune.config import yaml_file
    from finetune.config.settings import DEMO

    settings = {
        "max_steps": arguments.steps,
        "checkpointing": arguments.checkpointing,
        "optimizer": "adamw",
        "device": "cpu",
        "compute_dtype": "fp32",
        "threads": arguments.threads,
    }
    return yaml_file.replace(DEMO, settings)


def ours(config: Any) -> dict[str, Any]:
    import torch

    from finetune.data.batches import load_examples, total_steps, windows
    from finetune.disk.host_memory import peak_resident_bytes
    from finetune.model.load import attach_adapter, load_base, load_tokenizer
    from finetune.training.optim import make_optimizer
    from finetune.training.step import train_step

    torch.set_num_threads(config.train.threads)
    tokenizer = load_tokenizer(config.model)
    train = load_examples(config.data, tokenizer, seed=config.train.seed).train
    model = attach_adapter(load_base(config.model), config.adapter, seed=config.train.seed)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], config.train)
    total = total_steps(train, config.train)
    stats, clock = [], Clock()
    for step, window in enumerate(windows(train, config.train)):
        clock.begin()
        stats.append(train_step(model, window, optimizer, config.train, step=step, total_steps=total))
        clock.end()
    return {
        "losses": [s.loss for s in stats],
        "seconds": clock.wall,
        "cpu_seconds": clock.cpu,
        "tokens": [s.tokens for s in stats],
        "peak_rss_bytes": peak_resident_bytes(),
    }


def trainer(config: Any) -> dict[str, Any]:
    """The recipe of transformers' and peft's documentation, told to take the same micro-batches in the same order."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

    from finetune.data.batches import load_examples, windows
    from finetune.disk.host_memory import peak_resident_bytes
    from finetune.model.load import load_tokenizer, resolve_path
    from finetune.training.optim import BETAS, EPS, learning_rate

    torch.set_num_threads(config.train.threads)
    tokenizer = load_tokenizer(config.model)
    train = load_examples(config.data, tokenizer, seed=config.train.seed).train
    micro_batches, tokens = [], []
    for window in windows(train, config.train):
        tokens.append(sum(batch.tokens for batch in window))
        for batch in window:
            mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
            micro_batches.append({"input_ids": batch.input_ids, "labels": batch.labels, "attention_mask": mask})
    model = AutoModelForCausalLM.from_pretrained(
        resolve_path(config.model),
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    checkpointing = config.train.checkpointing
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    adapter = config.adapter
    lora = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
    )
    torch.manual_seed(config.train.seed)
    model = get_peft_model(model, lora)
    rates = [learning_rate(step, config.train.max_steps, config.train) for step in range(config.train.max_steps)]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1.0, betas=BETAS, eps=EPS, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[min(step, len(rates) - 1)])

    clock = Clock()

    class Timed(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=config.train.max_steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=config.train.accumulation,
            max_grad_norm=config.train.clip,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        loop = Trainer(
            model=model,
            args=arguments,
            train_dataset=micro_batches,
            data_collator=lambda items: items[0],
            optimizers=(optimizer, schedule),
            callbacks=[Timed()],
        )
        loop.train()
    losses = [row["loss"] for row in loop.state.log_history if "loss" in row]
    return {
        "losses": losses,
        "seconds": clock.wall,
        "cpu_seconds": clock.cpu,
        "tokens": tokens,
        "peak_rss_bytes": peak_resident_bytes(),
    }


def measured(side: str, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments, "--side", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def speed(result: dict[str, Any], clock: str) -> float:
    return float(sum(result["tokens"][WARM_UP:]) / sum(result[clock][WARM_UP:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps (default: 6)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each side (default: 1)")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--side", choices=("trainer", "ours"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        sides = {"trainer": trainer, "ours": ours}
        print(json.dumps(sides[arguments.side](config_of(arguments))))
        return
    theirs, mine = measured("trainer", sys.argv[1:]), measured("ours", sys.argv[1:])
    print(f"{'':24}{'Trainer + peft':>16}{'finetune':>16}{'ratio':>10}")
    for name, clock in (("tokens/s", "seconds"), ("tokens/CPU second", "cpu_seconds")):
        fast, faster = speed(theirs, clock), speed(mine, clock)
        print(f"{name:24}{fast:16.1f}{faster:16.1f}{faster / fast:10.2f}")
    big, small = theirs["peak_rss_bytes"] / MIB, mine["peak_rss_bytes"] / MIB
    print(f"{'peak RSS, MiB':24}{big:16.0f}{small:16.0f}{small / big:10.2f}")
    for step, (a, b) in enumerate(zip(theirs["losses"], mine["losses"], strict=True), start=1):
        print(f"{f'loss of step {step}':24}{a:16.4f}{b:16.4f}{b / a:10.4f}")


if __name__ == "__main__":
    main()
