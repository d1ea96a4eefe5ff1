"""Engines for many ranks, each in a few steps: what every rank holds at most, and that it gets through.

    engines.py COUNT NAME...

Prints, by name, what each rank returned, with the seconds of the job.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import job
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

WIDTH, LAYERS = 256, 4
LAYER = WIDTH * WIDTH * 4


def layers(count: int = LAYERS) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count)])


def batch() -> torch.Tensor:
    return torch.randn(8, WIDTH, device="cuda")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, clip: bool = False) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        model(batch()).sum().backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"peak": torch.cuda.max_memory_allocated(), "parameters": elements(model)}


def elements(model: nn.Module) -> int:
    return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.parameters())


def ddp(rank: int, count: int, **options: Any) -> dict[str, Any]:
    model = nn.parallel.DistributedDataParallel(layers().cuda(), device_ids=[rank], **options)
    return train(model, torch.optim.AdamW(model.parameters()))


def ddp_views(rank: int, count: int) -> dict[str, Any]:
    return ddp(rank, count, gradient_as_bucket_view=True)


def zero1(rank: int, count: int) -> dict[str, Any]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(layers().cuda(), device_ids=[rank])
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW)
    found = train(model, optimizer)
    optimizer.consolidate_state_dict()
    return found | {"states": sum(t.numel() for s in optimizer.optim.state.values() for t in s.values() if t.dim())}


def fsdp1(rank: int, count: int) -> dict[str, Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = FullyShardedDataParallel(layers().cuda(), auto_wrap_policy=ModuleWrapPolicy({nn.Linear}), device_id=rank)
    found = train(model, torch.optim.AdamW(model.parameters()))
    norm = model.clip_grad_norm_(1.0)
    return found | {"norm": list(norm.shape)}


def fsdp2(rank: int, count: int, mesh: Any = None, device: str = "cuda", **options: Any) -> dict[str, Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with torch.device("meta"):
        model = layers()
    options |= {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    for layer in model:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    model.to_empty(device=device)
    return train(model, torch.optim.AdamW(model.parameters()), clip=device == "cuda")


def fsdp2_offload(rank: int, count: int) -> dict[str, Any]:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return fsdp2(rank, count, device="cpu", offload_policy=CPUOffloadPolicy())


def hsdp(rank: int, count: int) -> dict[str, Any]:
    return fsdp2(rank, count, init_device_mesh("cuda", (count // 2, 2), mesh_dim_names=("replicate", "shard")))


hsdp.eager = True  # type: ignore[attr-defined]  # a mark that ranks.py reads


def tensor_parallel(rank: int, count: int) -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cuda", (count,))
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel(), "2": ColwiseParallel(), "3": RowwiseParallel()}
    model = parallelize_module(layers().cuda(), mesh, plan)
    return train(model, torch.optim.AdamW(model.parameters(), foreach=True), clip=True)


def sequence_parallel(rank: int, count: int) -> dict[str, Any]:
    """Norms and dropout on a part of the rows of each sequence; the products on a part of the columns."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    norms = [nn.Sequential(nn.LayerNorm(WIDTH), nn.Dropout(0.1)) for _ in range(2)]
    model = nn.Sequential(norms[0], *layers(2), norms[1], *layers(2)).cuda()
    plan: dict[str, Any] = {"0": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(0))}
    for norm in ("0", "3"):
        plan |= {f"{norm}.0": SequenceParallel(sequence_dim=0), f"{norm}.1": SequenceParallel(sequence_dim=0)}
    for first in (1, 4):
        plan[str(first)] = ColwiseParallel(input_layouts=Shard(0))
        plan[str(first + 1)] = RowwiseParallel(output_layouts=Shard(0) if first == 1 else Replicate())
    model = parallelize_module(model, init_device_mesh("cuda", (count,)), plan)
    found = train(model, torch.optim.AdamW(model.parameters(), foreach=True), clip=True)
    return found | {"parameters": elements(nn.ModuleList([model[i] for i in (1, 2, 4, 5)]))}


def context_parallel(rank: int, count: int) -> dict[str, Any]:
    """Attention over a sequence of which each rank has a part; the parts of keys and values go round."""
    from torch.distributed.tensor.experimental import context_parallel as split
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads, tokens = 4, 64 * count
    model = nn.Linear(WIDTH, 3 * WIDTH, bias=False, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1, tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    mesh = init_device_mesh("cuda", (count,))
    torch.cuda.reset_peak_memory_stats()
    with split(mesh, buffers=[x], buffer_seq_dims=[1]), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        own = x.shape[1]
        qkv = model(x).view(1, own, 3, heads, WIDTH // heads).transpose(1, 3).unbind(2)
        nn.functional.scaled_dot_product_attention(*qkv, is_causal=True).sum().backward()
    return {"peak": torch.cuda.max_memory_allocated(), "tokens": own}


def pipeline(rank: int, count: int, schedule: str = "Schedule1F1B") -> dict[str, Any]:
    from torch.distributed import pipelining

    device = torch.device("cuda", rank)
    stage = pipelining.PipelineStage(layers(1).to(device), rank, count, device)
    run = getattr(pipelining, schedule)(stage, n_microbatches=count, loss_fn=lambda y, target: (y - target).sum())
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        if rank == 0:
            run.step(torch.randn(8 * count, WIDTH, device=device))
        elif rank == count - 1:
            run.step(target=torch.zeros(8 * count, WIDTH, device=device), losses=[])
        else:
            run.step()
    return {"peak": torch.cuda.max_memory_allocated(), "parameters": elements(stage.submod)}


def gpipe(rank: int, count: int) -> dict[str, Any]:
    return pipeline(rank, count, "ScheduleGPipe")


def experts(rank: int, count: int) -> dict[str, Any]:
    """One expert a rank; tokens go to the expert that their number says, and come back."""
    expert = nn.Linear(WIDTH, WIDTH, bias=False).cuda()
    chosen = torch.arange(8, device="cuda") % count if rank == 0 else torch.zeros(8, device="cuda", dtype=torch.int64)
    sent = torch.bincount(chosen, minlength=count)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    tokens = batch()[chosen.argsort()]
    mine = tokens.new_empty(int(received.sum()), WIDTH)
    dist.all_to_all_single(mine, tokens, received.tolist(), sent.tolist())
    back = torch.empty_like(tokens)
    dist.all_to_all_single(back, expert(mine), sent.tolist(), received.tolist())
    return {"peak": torch.cuda.max_memory_allocated(), "received": received.tolist(), "tokens": len(mine)}


def main() -> None:
    count, found = int(sys.argv[1]), {}
    for name in sys.argv[2:]:
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            context = torch.multiprocessing.get_context("fork")
            ranks = [context.Process(target=job, args=(globals()[name], r, count, folder)) for r in range(count)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            left = [Path(folder, f"{rank}.json") for rank in range(count)]
            seconds = {"seconds": round(time.monotonic() - began, 1)}
            found[name] = [json.loads(path.read_text()) | seconds if path.exists() else None for path in left]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
