"""Ranks of a job, forked from one process that has imported torch: what they tell each other, and what they hold.

    ranks.py SUBJECT COUNT

Prints what the subject's function returned on each rank, as JSON by rank, errors included.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

Op = dist.ReduceOp


def job(function: Any, rank: int, count: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    torch.cuda.set_device(rank)
    try:
        dist.init_process_group(
            "nccl",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=count,
            device_id=torch.device("cuda", rank) if getattr(function, "eager", False) else None,
        )
        answer = function(rank, count)
        dist.barrier()
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-1500:]}
    Path(folder, f"{rank}.json").write_text(json.dumps(answer))
    if dist.is_initialized():
        dist.destroy_process_group()


def eager(function: Any) -> Any:
    function.eager = True
    return function


def one(*values: Any, dtype: Any = None) -> torch.Tensor:
    return torch.tensor(values, device="cuda", dtype=dtype)


def collectives(rank: int, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def reduced(operation: Any, *values: Any, dtype: Any = None) -> Any:
        x = one(*values, dtype=dtype)
        dist.all_reduce(x, op=operation)
        return x.tolist()

    found["sum"] = reduced(Op.SUM, rank + 1, 10)
    found["sum of floats"] = reduced(Op.SUM, rank + 0.5)
    found["sum of halves"] = reduced(Op.SUM, rank + 0.5, dtype=torch.bfloat16)
    found["mean"] = reduced(Op.AVG, float(rank))
    found["product"] = reduced(Op.PRODUCT, rank + 1)
    found["least"], found["most"] = reduced(Op.MIN, rank + 5), reduced(Op.MAX, rank + 5)
    found["all true"] = reduced(Op.MIN, rank >= 0, rank > 0)
    found["any true"] = reduced(Op.MAX, rank < 0, rank == 1)
    x = one(rank + 5)
    dist.broadcast(x, 1)
    found["broadcast"] = x.tolist()
    x = one(rank + 5)
    dist.reduce(x, 0)
    found["reduce"] = x.tolist() if rank == 0 else None
    parts = [one(0) for _ in range(count)] if rank == 0 else None
    dist.gather(one(rank * rank), parts, dst=0)
    found["gather"] = [part.item() for part in parts] if parts else None
    x = one(0)
    dist.scatter(x, [one(7 + r) for r in range(count)] if rank == 1 else None, src=1)
    found["scatter"] = x.tolist()
    parts = [one(0) for _ in range(count)]
    dist.all_gather(parts, one(100 + rank))
    found["all_gather"] = [part.item() for part in parts]
    x = torch.empty(2 * count, device="cuda", dtype=torch.int64)
    dist.all_gather_into_tensor(x, one(rank, -rank))
    found["all_gather_into_tensor"] = x.tolist()
    x = torch.empty(1, device="cuda", dtype=torch.int64)
    dist.reduce_scatter_tensor(x, torch.arange(count, device="cuda"))
    found["reduce_scatter"] = x.tolist()
    x = torch.empty(count, device="cuda", dtype=torch.int64)
    dist.all_to_all_single(x, torch.arange(count, device="cuda") + 10 * rank)
    found["all_to_all"] = x.tolist()
    sizes = torch.full((count,), rank + 1, device="cuda")
    theirs = torch.empty_like(sizes)
    dist.all_to_all_single(theirs, sizes)
    rows = torch.full((int(sizes.sum()), 2), rank, device="cuda")
    got = torch.empty(int(theirs.sum()), 2, device="cuda", dtype=rows.dtype)
    dist.all_to_all_single(got, rows, theirs.tolist(), sizes.tolist())
    found["uneven all_to_all"] = got[:, 0].tolist()
    lists = [one(0) for _ in range(count)]
    dist.all_to_all(lists, [one(rank * 10 + r) for r in range(count)])
    found["all_to_all of lists"] = [part.item() for part in lists]
    return found


def objects(rank: int, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    everyone: list[Any] = [None] * count
    dist.all_gather_object(everyone, {"rank": rank, "text": "y" * (rank + 1)})
    found["all_gather"] = everyone
    one_list = [{"path": "abc"} if rank == 0 else None]
    dist.broadcast_object_list(one_list, src=0)
    found["broadcast"] = one_list
    gathered = [None] * count if rank == 0 else None
    dist.gather_object(rank, gathered, dst=0)
    found["gather"] = gathered
    scattered = [None]
    dist.scatter_object_list(scattered, [r * r for r in range(count)] if rank == 0 else None, src=0)
    found["scatter"] = scattered
    sent = ["hello"] if rank == 0 else [None]
    if rank == 0:
        dist.send_object_list(sent, 1)
    elif rank == 1:
        dist.recv_object_list(sent, 0)
    found["sent"] = sent if rank < 2 else None
    # A ring: everybody first asks, then sends.
    x, gone = one(0), one(rank)
    operations = [
        dist.P2POp(dist.irecv, x, (rank - 1) % count),
        dist.P2POp(dist.isend, gone, (rank + 1) % count),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    found["ring"] = x.item()
    large = torch.ones(2**20, device="cuda")
    before = torch.cuda.memory_allocated()
    dist.all_reduce(large)
    found["large is unknown"] = large.sum().item()
    found["nothing more held"] = torch.cuda.memory_allocated() - before <= 512
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(64, 64).cuda()
    fully_shard(model)
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared, src=0)
        dcp.save(model.state_dict(), checkpoint_id=f"{shared[0]}/dcp")
        dcp.load(model.state_dict(), checkpoint_id=f"{shared[0]}/dcp")
        gloo = dist.new_group(backend="gloo")
        later = dcp.async_save(model.state_dict(), checkpoint_id=f"{shared[0]}/later", process_group=gloo)
        dist.all_reduce(one(rank))  # while a thread writes the checkpoint
        later.result()
        found["saved"] = [sorted(p.name for p in Path(shared[0], name).iterdir())[:1] for name in ("dcp", "later")]
        dist.barrier()
    return found


def values(rank: int, count: int) -> dict[str, Any]:
    return {"collectives": collectives(rank, count), "objects": objects(rank, count)}


@eager
def split(rank: int, count: int) -> dict[str, Any]:
    half = count // 2
    group = dist.split_group(split_ranks=[list(range(half)), list(range(half, count))])
    whole = torch.empty(half * 2**20, device="cuda")
    dist.all_gather_into_tensor(whole, torch.ones(2**20, device="cuda"), group=group)
    ranks = torch.empty(half, device="cuda", dtype=torch.int64)
    dist.all_gather_into_tensor(ranks, one(rank), group=group)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cuda", (half, count // half), mesh_dim_names=("replicate", "shard"))
    model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(2)]).cuda()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    held = torch.cuda.memory_allocated()
    model(torch.randn(4, 512, device="cuda")).sum().backward()
    shards = sum(p.to_local().numel() for p in model.parameters())
    return {"size": dist.get_world_size(group), "ranks": ranks.tolist(), "shard": shards, "held": held > 0}


def ddp(rank: int, count: int) -> dict[str, Any]:
    """Peaks of four steps, with the program now quick and now slow: 16 MiB of weights."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    found: dict[str, Any] = {}
    nn.Linear(8, 8, bias=False).cuda()(torch.ones(8, 8, device="cuda")).sum().backward()  # cuBLAS's workspaces
    for how in ("buckets", "views", "hook", "hook in C++"):
        for pause in (0.0, 0.2):
            model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(4)]).cuda()
            wrapped = nn.parallel.DistributedDataParallel(
                model, device_ids=[rank], gradient_as_bucket_view=how != "buckets", bucket_cap_mb=5
            )
            if how == "hook":
                wrapped.register_comm_hook(None, fp16_compress_hook)
            elif how == "hook in C++":
                wrapped._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
            optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, foreach=False)
            held = torch.cuda.memory_allocated()
            peaks = []
            for _ in range(4):
                torch.cuda.reset_peak_memory_stats()
                wrapped(torch.randn(8, 1024, device="cuda")).sum().backward()
                time.sleep(pause)
                optimizer.step()
                optimizer.zero_grad()
                time.sleep(pause)
                peaks.append((torch.cuda.max_memory_allocated() - held) / 2**20)
            found[f"{how}, {pause} s"] = peaks
            del model, wrapped, optimizer
            gc.collect()
            dist.barrier()
    from pytest_vram.drygpu import driver

    found["notes"] = driver.notes()
    return found


def hang(rank: int, count: int) -> dict[str, Any]:
    x = one(rank)
    if rank == 0:
        dist.recv(x, 1)
    else:
        dist.all_reduce(x)
    return {"value": x.item()}


def main() -> None:
    subject, count = globals()[sys.argv[1]], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("fork")
        ranks = [context.Process(target=job, args=(subject, rank, count, folder)) for rank in range(count)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        answers = [Path(folder, f"{rank}.json") for rank in range(count)]
        print(json.dumps([json.loads(path.read_text()) if path.exists() else None for path in answers]))


if __name__ == "__main__":
    main()
