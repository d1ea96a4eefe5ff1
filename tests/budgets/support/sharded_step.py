"""Two sharded steps of one rank, beneath a dry run with a card for each rank.

This command measures a row of ``sharded_steps.json``:

PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python -m pytest_vram run --gpu CARD --count 2 --
    torchrun --nproc-per-node 2 tests/budgets/support/sharded_step.py SHAPE SEQ

Each rank prints JSON lines with its figures in bytes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from finetune.config.settings import AdapterConfig, ModelConfig, TrainConfig
from finetune.data.batches import Batch
from finetune.model.load import attach_adapter, load_base
from finetune.model.shapes import load_shape
from finetune.model.shard import shard_base
from finetune.training.optim import make_optimizer
from finetune.training.step import train_step
from pytest_vram.drygpu import driver, empty_checkpoint


def main() -> None:
    name, seq = sys.argv[1], int(sys.argv[2])
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl")
    config = load_shape(name)
    config.dtype = "bfloat16"
    figures = {"rank": rank, "shape": name, "seq": seq}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = empty_checkpoint(config, Path(folder))
        base = load_base(ModelConfig(model=str(checkpoint), precision="nf4", device="cuda", shard=True))
    figures |= {"loaded": torch.cuda.memory_allocated(), "loading_peak": torch.cuda.max_memory_allocated()}
    model = attach_adapter(base, AdapterConfig(), seed=0)
    shard_base(model)
    torch.cuda.empty_cache()
    print(json.dumps(figures), flush=True)
    figures |= {"sharded": torch.cuda.memory_allocated(), "sharding_peak": torch.cuda.max_memory_allocated()}
    train = TrainConfig(max_steps=2, kernels="torch")
    optimizer = make_optimizer(model.parameters(), train)
    ids = (torch.arange(seq) % 1000)[None]
    window = [Batch(input_ids=ids, labels=ids.clone()) for _ in range(2)]
    torch.cuda.reset_peak_memory_stats()
    for step in range(2):
        train_step(model, window, optimizer, train, step=step, total_steps=2)
    figures |= {
        "step_peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "device_peak": driver.stats(rank).peak_bytes if driver.is_active() else 0,
    }
    print(json.dumps(figures), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
