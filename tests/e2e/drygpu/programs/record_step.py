"""Two training steps of a small transformer, and every request that they made of the allocator."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

torch.cuda.memory._record_memory_history(max_entries=1_000_000, context=None, stacks="python")
model = torch.nn.Sequential(
    torch.nn.Embedding(8000, 512),
    *[torch.nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True) for _ in range(4)],
    torch.nn.Linear(512, 8000),
).to("cuda", torch.bfloat16)
optimizer = torch.optim.AdamW(model.parameters())
tokens = torch.zeros(4, 384, dtype=torch.long).cuda()
for _ in range(2):
    loss = torch.nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
del loss
torch.cuda.synchronize()
stats = torch.cuda.memory_stats()
trace = torch.cuda.memory._snapshot()["device_traces"][0]
requests = [
    (entry["action"], entry["addr"], entry["size"], entry["stream"])
    for entry in trace
    if entry["action"] in ("alloc", "free_requested")
]
segments = [(entry["action"], entry["size"]) for entry in trace if entry["action"].startswith("segment")]
Path(sys.argv[1]).write_text(json.dumps(requests))
print(json.dumps({"stats": stats, "requests": len(requests), "segments": segments}))
