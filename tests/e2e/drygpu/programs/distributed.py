"""One process as one rank of eight: sharded weights, and both cards of a data-parallel module."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pytest_vram.drygpu import driver


def connections() -> int:
    """Return what NCCL takes on the first card now."""
    driver.reset_peaks()
    return driver.stats(0).links_peak_bytes


dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=8)
torch.cuda.set_device(0)
mesh = init_device_mesh("cuda", (8,))
with torch.device("meta"):
    model = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048, bias=False) for _ in range(8)])
for layer in model:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
model.to_empty(device="cuda")
sharded = torch.cuda.memory_allocated()
optimizer = torch.optim.AdamW(model.parameters())
model(torch.randn(4, 2048, device="cuda")).sum().backward()
optimizer.step()
optimizer.zero_grad()
links = {"collectives": connections()}
small = torch.ones(4, device="cuda")
dist.all_reduce(small)
links["no second time"] = connections()
sent, received = (dist.P2POp(way, small, peer=3) for way in (dist.isend, dist.irecv))
for work in dist.batch_isend_irecv([sent, received]):
    work.wait()
links["one peer"] = connections()
dist.destroy_process_group()
links["destroyed"] = connections()

replicated = torch.nn.DataParallel(torch.nn.Linear(256, 256).cuda())
replicated(torch.randn(8, 256, device="cuda")).sum().backward()
second = torch.cuda.max_memory_allocated(1)
print(json.dumps({"sharded": sharded, "notes": driver.notes(), "second card": second, "links": links}))
