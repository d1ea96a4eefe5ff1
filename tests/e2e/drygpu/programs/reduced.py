"""One process as one rank of two: what NCCL's reductions make of small tensors, in place and in groups."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist

dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=2)
torch.cuda.set_device(0)


def reduced(**how: dist.ReduceOp.RedOpType) -> list[int]:
    tensor = torch.tensor([3, 5], device="cuda")
    dist.all_reduce(tensor, **how)
    return tensor.tolist()


found = {
    "plain": reduced(),
    "sum": reduced(op=dist.ReduceOp.SUM),
    "largest": reduced(op=dist.ReduceOp.MAX),
    "sum again": reduced(),
}
several = [torch.tensor([n], device="cuda") for n in (1, 2)]
dist.all_reduce_coalesced(several)
found["several"] = [tensor.item() for tensor in several]
dist.destroy_process_group()
print(json.dumps(found))
