"""Tensors on the card that another process gets: through a queue, and from the worker of a DataLoader."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import torch
import torch.multiprocessing as processes
from torch.utils.data import DataLoader, Dataset

from pytest_vram.drygpu import driver


class OnCard(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((256, 1024), float(index), device="cuda")


def used() -> int:
    """Bytes that this process holds of the card, beside the context."""
    stats = driver.stats(0)
    return stats.used_bytes - stats.context_bytes


def receive(tensors: Any, results: Any) -> None:
    whole, rows = tensors.get(), tensors.get()
    found = {
        "shape": list(whole.shape),
        "offset": rows.data_ptr() - whole.data_ptr(),
        "allocated": torch.cuda.memory_allocated(),
        "used": used(),
    }
    cudart = ctypes.CDLL(None)
    found["freed by the wrong call"] = cudart.cudaFree(ctypes.c_void_p(whole.data_ptr()))
    cudart.cudaGetLastError()  # clears it
    found["sum"] = list((whole @ whole.T).shape)
    del whole, rows
    results.put(found)
    tensors.get()


# The processes are forked before anything asks for the card: a forked process cannot use one that was in use.
context = processes.get_context("fork")
tensors, results = context.Queue(), context.Queue()
receiver = context.Process(target=receive, args=(tensors, results), daemon=True)
receiver.start()
batches = iter(DataLoader(OnCard(), batch_size=2, num_workers=1, multiprocessing_context=context))
whole = torch.ones(1024, 1024, device="cuda")
before = used()
tensors.put(whole)
tensors.put(whole[1:])
answers = results.get(timeout=600)
tensors.put(None)
receiver.join()
answers["exit code"] = receiver.exitcode
answers["batches"] = [list(batch.shape) for batch in batches]
torch.cuda.ipc_collect()
answers["own"] = used() - before
print(json.dumps(answers))
