"""One rank of a job that torchrun or accelerate started: accelerate's own loop, or transformers' Trainer.

    launched.py accelerate|trainer FOLDER

Each rank leaves RANK.json in the folder.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn


def accelerate(folder: Path) -> dict[str, Any]:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, TensorDataset

    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)])
    optimizer = torch.optim.AdamW(model.parameters())
    loader = DataLoader(TensorDataset(torch.randn(32, 256)), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loss = torch.zeros(())
    for (x,) in loader:
        with accelerator.accumulate(model):
            loss = model(x).square().mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    gathered = accelerator.gather(loss.detach()[None])
    numbers = accelerator.gather(torch.tensor([accelerator.process_index], device=accelerator.device))
    accelerator.save_state(str(folder / "state"))
    accelerator.end_training()
    return {"kind": str(accelerator.distributed_type), "losses": len(gathered), "ranks": numbers.tolist()}


def trainer(folder: Path) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    rows = [{"input_ids": torch.arange(16), "labels": torch.arange(16)} for _ in range(16)]
    arguments = TrainingArguments(
        str(folder / "out"),
        per_device_train_batch_size=2,
        max_steps=3,
        logging_steps=1,
        save_strategy="steps",
        save_steps=3,
        report_to=[],
        bf16=True,
        disable_tqdm=True,
    )
    done = Trainer(LlamaForCausalLM(config), arguments, train_dataset=rows, eval_dataset=rows[:4])
    done.train()
    saved = sorted(path.name for path in (folder / "out").glob("checkpoint-*"))
    return {"steps": done.state.global_step, "saved": saved, "evaluated": "eval_loss" in done.evaluate()}


def main() -> None:
    folder = Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    answer = globals()[sys.argv[1]](folder)
    answer["peak"] = torch.cuda.max_memory_allocated()
    (folder / f"{rank}.json").write_text(json.dumps(answer))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
