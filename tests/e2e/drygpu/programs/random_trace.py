"""A random life of the allocator: what it did, as a digest, and whether the driver ever counted otherwise."""

from __future__ import annotations

import hashlib
import json
import random
import sys

import torch

from pytest_vram.drygpu import driver

seed, steps = int(sys.argv[1]), int(sys.argv[2])
chance = random.Random(seed)
digest = hashlib.sha256()
streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
live: list[torch.Tensor] = []
disagreements: list[str] = []
ooms = 0


def compare(step: int) -> None:
    """The allocator's statistics against the driver's own count."""
    stats, driven = torch.cuda.memory_stats(), driver.stats(0)
    held = driven.used_bytes - driven.context_bytes
    if held != stats["reserved_bytes.all.current"]:
        disagreements.append(f"step {step}: reserved {stats['reserved_bytes.all.current']}, driver {held}")
    if driven.peak_bytes - driven.context_bytes != stats["reserved_bytes.all.peak"]:
        disagreements.append(f"step {step}: peak {stats['reserved_bytes.all.peak']}, driver {driven.peak_bytes}")
    free, total = torch.cuda.mem_get_info()
    if total - free != driven.used_bytes:
        disagreements.append(f"step {step}: mem_get_info says {total - free} used, driver {driven.used_bytes}")


torch.cuda.synchronize()
for step in range(steps):
    action = chance.random()
    if live and action < 0.42:
        live.pop(chance.randrange(len(live)))
    elif live and action < 0.46:
        live[chance.randrange(len(live))].record_stream(chance.choice(streams))
    elif action < 0.47:
        torch.cuda.empty_cache()
    elif action < 0.475:
        torch.cuda.set_per_process_memory_fraction(chance.choice([0.5, 0.9, 1.0]))
    else:
        size = int(2 ** chance.uniform(6, 31))
        try:
            with torch.cuda.stream(chance.choice(streams)):
                live.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            digest.update(live[-1].data_ptr().to_bytes(8, "little"))
        except torch.OutOfMemoryError:
            ooms += 1
            del live[::2]
    if step % 20 == 0:
        compare(step)
compare(steps)

stats = torch.cuda.memory_stats()
digest.update(json.dumps(stats, sort_keys=True).encode())
if torch.cuda.get_allocator_backend() == "native":  # the other one keeps no blocks to look at
    snapshot = torch.cuda.memory_snapshot()
    digest.update(json.dumps(snapshot, sort_keys=True, default=str).encode())
    segments = sum(segment["total_size"] for segment in snapshot)
    if segments != stats["reserved_bytes.all.current"]:
        disagreements.append(f"segments hold {segments}, reserved is {stats['reserved_bytes.all.current']}")
peak = stats["reserved_bytes.all.peak"]
live.clear()
torch.cuda.empty_cache()
left = driver.stats(0)
print(
    json.dumps(
        {
            "digest": digest.hexdigest(),
            "disagreements": disagreements,
            "ooms": ooms,
            "retries": stats.get("num_alloc_retries", 0),
            "peak": peak,
            "left_bytes": left.used_bytes - left.context_bytes,
            "missing": driver.missing_functions(),
        }
    )
)
