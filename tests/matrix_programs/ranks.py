"""One rank of two: what NCCL's all_reduce makes of a small tensor, on dry GPUs."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist

dist.init_process_group("nccl")
torch.cuda.set_device(dist.get_rank())
counted = torch.tensor([3, 5], device="cuda")
dist.all_reduce(counted)
layer = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8).cuda())
layer(torch.randn(2, 8, device="cuda")).sum().backward()
if dist.get_rank() == 0:
    print(json.dumps({"sum": counted.tolist()}))
dist.destroy_process_group()
