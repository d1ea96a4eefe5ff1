"""The requests that ``record_step.py`` recorded, made again with no model at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

torch.cuda.memory._record_memory_history(max_entries=1_000_000, context=None, stacks="python")
torch.cuda.synchronize()
where: dict[int, int] = {}
for action, address, size, stream in json.loads(Path(sys.argv[1]).read_text()):
    if action == "alloc":
        where[address] = torch.cuda.caching_allocator_alloc(size, 0, torch.cuda.ExternalStream(stream) if stream else 0)
    else:
        torch.cuda.caching_allocator_delete(where.pop(address))
trace = torch.cuda.memory._snapshot()["device_traces"][0]
segments = [(entry["action"], entry["size"]) for entry in trace if entry["action"].startswith("segment")]
print(json.dumps({"stats": torch.cuda.memory_stats(), "segments": segments}))
