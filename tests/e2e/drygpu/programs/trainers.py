"""Whole training loops that people use: transformers' Trainer, TRL's SFTTrainer, autocast with a gradient scaler."""

from __future__ import annotations

import sys
from typing import Any

import torch
from checks import Checks
from peft import LoraConfig, get_peft_model
from tiny import batch, model
from transformers import Trainer, TrainingArguments

from pytest_vram.drygpu.values import host_reads

check = Checks()
FOLDER = sys.argv[1]


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]  # torch's Dataset is generic only for mypy
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(1, 500, (32,))
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def _arguments(steps: int, **how: Any) -> TrainingArguments:
    usual = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    return TrainingArguments(FOLDER, max_steps=steps, per_device_train_batch_size=2, **{**usual, **how})


@check
def trainer_in_bfloat16() -> Any:
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "dataloader_num_workers": 1}
    arguments = _arguments(3, bf16=True, gradient_accumulation_steps=2, **evaluated)
    trainer = Trainer(model(dtype=torch.float32), arguments, train_dataset=Rows(), eval_dataset=Rows())
    return trainer.train().global_step


@check
def trainer_in_float16_scales_gradients() -> Any:
    """The scaler must not skip a step: the learning rate moves with each."""
    host_reads.reset()
    trainer = Trainer(model(dtype=torch.float32), _arguments(3, fp16=True), train_dataset=Rows())
    trainer.train()
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


@check
def trainer_with_checkpointing_and_paged_optimizer() -> Any:
    arguments = _arguments(2, gradient_checkpointing=True, optim="paged_adamw_32bit")
    return Trainer(model(), arguments, train_dataset=Rows()).train().global_step


@check
def trainer_saves_and_resumes() -> Any:
    def adapted() -> Any:
        return get_peft_model(model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))

    for steps, resume in ((1, None), (3, True)):
        arguments = _arguments(steps, save_strategy="steps", save_steps=1, optim="adamw_bnb_8bit")
        done = Trainer(adapted(), arguments, train_dataset=Rows()).train(resume_from_checkpoint=resume).global_step
    return done


@check
def sft_trainer() -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = models.WordLevel({f"w{i}": i for i in range(512)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="w0", eos_token="w1")
    rows = Dataset.from_dict({"input_ids": [list(range(1, 40)) for _ in range(8)]})
    usual = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "bf16": True, "max_length": 64}
    arguments = SFTConfig(FOLDER, max_steps=2, per_device_train_batch_size=2, **usual)
    trainer = SFTTrainer(model(), args=arguments, train_dataset=rows, processing_class=tokenizer)
    return trainer.train().global_step


@check
def autocast_and_scaler() -> Any:
    made = model(dtype=torch.float32)
    optimizer, scaler = torch.optim.AdamW(made.parameters()), torch.amp.GradScaler("cuda")
    for _ in range(3):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = made(**batch()).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0, error_if_nonfinite=True)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    steps = {int(state["step"]) for state in optimizer.state.values()}
    return {"scale": scaler.get_scale(), "steps": sorted(steps)}


@check
def torch_optimizers() -> Any:
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("AdamW", {"foreach": True}),
        ("AdamW", {"fused": True}),
        ("AdamW", {"foreach": False, "capturable": True, "amsgrad": True}),
        ("SGD", {"momentum": 0.9}),
        ("Adafactor", {}),
        ("Adagrad", {}),
        ("NAdam", {}),
        ("Muon", {}),
    ]
    for kind, how in kinds:
        layer = torch.nn.Linear(64, 64, bias=False, device="cuda")
        optimizer = getattr(torch.optim, kind)(layer.parameters(), lr=1e-3, **how)
        for _ in range(2):
            layer(torch.randn(4, 64, device="cuda")).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return len(kinds)


check.run()
