"""Children of a process that activated a dry GPU: by subprocess, spawn, fork, and a data loader's workers."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys


def describe(queue: multiprocessing.Queue[str]) -> None:
    import torch

    kept = torch.empty(1000, device="cuda")
    cards = f"{torch.cuda.device_count()} {torch.cuda.get_device_name()}"
    queue.put(f"{kept.numel()} {cards} {torch.cuda.memory_allocated()}")


def by(method: str) -> str:
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=describe, args=(queue,))
    process.start()
    answer = queue.get(timeout=120)
    process.join()
    return answer


def main() -> None:
    from pytest_vram.drygpu import activate

    activate("l4", count=2, replace_real_gpu=True)
    answers = {"spawn": by("spawn"), "fork before torch": by("fork")}

    code = "import torch as t; print(t.cuda.device_count(), t.cuda.get_device_name(), t.ones(5, device='cuda').numel())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    answers["subprocess"] = done.stdout.strip()

    import torch

    torch.cuda.init()
    rows = torch.utils.data.TensorDataset(torch.arange(8))
    loader = torch.utils.data.DataLoader(rows, batch_size=4, num_workers=2, pin_memory=True)
    answers["loader"] = [batch.cuda().cpu().tolist() for (batch,) in loader]
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
