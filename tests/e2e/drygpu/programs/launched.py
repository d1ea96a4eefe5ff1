"""One rank of a job that torchrun or accelerate started, by the engine that trains.

    launched.py ENGINE FOLDER

``ENGINE`` is a function below: accelerate's own loop, transformers' Trainer, TRL, Lightning or DeepSpeed. Each rank
leaves RANK.json in the folder.
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


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    )


def trainer(folder: Path) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

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
    done = Trainer(llama(), arguments, train_dataset=rows, eval_dataset=rows[:4])
    done.train()
    saved = sorted(path.name for path in (folder / "out").glob("checkpoint-*"))
    return {"steps": done.state.global_step, "saved": saved, "evaluated": "eval_loss" in done.evaluate()}


def trl(folder: Path) -> dict[str, Any]:
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({"<unk>": 0, "word": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<unk>")
    rows = datasets.Dataset.from_list([{"text": "word " * (8 + n)} for n in range(16)])
    settings = SFTConfig(
        str(folder / "out"), per_device_train_batch_size=2, max_steps=3, report_to=[], bf16=True, disable_tqdm=True
    )
    done = SFTTrainer(llama(), settings, train_dataset=rows, processing_class=tokenizer)
    done.train()
    return {"steps": done.state.global_step}


def lightning_ddp(folder: Path) -> dict[str, Any]:
    return lightning(folder, "ddp")


def lightning_fsdp(folder: Path) -> dict[str, Any]:
    return lightning(folder, "fsdp")


def lightning(folder: Path, strategy: str) -> dict[str, Any]:
    from lightning import LightningModule, Trainer
    from torch.utils.data import DataLoader, TensorDataset

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)])

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss = self.model(batch[0]).square().mean()
            self.log("loss", loss, sync_dist=True)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", self.model(batch[0]).square().mean(), sync_dist=True)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    count = int(os.environ["WORLD_SIZE"])
    loader = DataLoader(TensorDataset(torch.randn(8 * count, 256)), batch_size=4)
    done = Trainer(
        accelerator="gpu",
        devices=count,
        strategy=strategy,
        precision="bf16-mixed",
        max_epochs=2,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
    )
    done.fit(Module(), loader, loader)
    return {"steps": done.global_step}


def deepspeed_1(folder: Path) -> dict[str, Any]:
    return deepspeed(folder, {"stage": 1})


def deepspeed_2(folder: Path) -> dict[str, Any]:
    return deepspeed(folder, {"stage": 2})


def deepspeed_3(folder: Path) -> dict[str, Any]:
    return deepspeed(folder, {"stage": 3})


def deepspeed_3_offload(folder: Path) -> dict[str, Any]:
    return deepspeed(folder, {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}})


def deepspeed(folder: Path, zero: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed with an optimizer of torch: its own are extensions in CUDA and C++, which it compiles at first use."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1.0,
    }
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=zero["stage"] == 3):
        model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)])
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), foreach=False), config=config
    )
    for _ in range(3):
        engine.backward(engine(torch.randn(4, 256, device=engine.device, dtype=torch.bfloat16)).square().mean())
        engine.step()
    engine.save_checkpoint(str(folder / "saved"))
    return {"steps": engine.global_steps}


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
