"""Engines for many ranks, each in a few steps: what every rank holds at most, and that it gets through.

    engines.py COUNT NAME...

Prints, by name, what each rank returned.
"""

from __future__ import annotations

import json
import sys
import tempfile
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


def ddp(rank: int, count: int) -> dict[str, Any]:
    model = nn.parallel.DistributedDataParallel(layers().cuda(), device_ids=[rank])
    return train(model, torch.optim.AdamW(model.parameters()))


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


def fsdp2(rank: int, count: int, mesh: Any = None) -> dict[str, Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with torch.device("meta"):
        model = layers()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in model:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device="cuda")
    return train(model, torch.optim.AdamW(model.parameters()), clip=True)


def hsdp(rank: int, count: int) -> dict[str, Any]:
    return fsdp2(rank, count, init_device_mesh("cuda", (count // 2, 2), mesh_dim_names=("replicate", "shard")))


hsdp.eager = True  # type: ignore[attr-defined]  # a mark that ranks.py reads


def tensor_parallel(rank: int, count: int) -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cuda", (count,))
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel(), "2": ColwiseParallel(), "3": RowwiseParallel()}
    model = parallelize_module(layers().cuda(), mesh, plan)
    return train(model, torch.optim.AdamW(model.parameters(), foreach=True), clip=True)


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
            context = torch.multiprocessing.get_context("fork")
            ranks = [context.Process(target=job, args=(globals()[name], r, count, folder)) for r in range(count)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            left = [Path(folder, f"{rank}.json") for rank in range(count)]
            found[name] = [json.loads(path.read_text()) if path.exists() else None for path in left]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
