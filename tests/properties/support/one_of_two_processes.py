"""One process of a data-parallel pair: ``python one_of_two_processes.py RANK STORE OUT``.

Runs each window of ``WINDOWS`` with its share of the rows, and each rank writes its gradients. Then each chooses its
split on a card of its own kind, and writes what it chose.
"""

from __future__ import annotations

import contextlib
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tiny_models import IGNORED, Row, make_rows, padded, tiny_model

from finetune.config import yaml_file
from finetune.config.settings import RunConfig, TrainConfig
from finetune.dryrun.full_rows import FullRows
from finetune.estimate.arithmetic import estimate
from finetune.model.shapes import SHAPES
from finetune.training import split
from finetune.training.accumulate import window_gradients

GIB = 2**30
NO_TARGETS: list[Row] = [([5, 6, 7], [IGNORED] * 3)]
WINDOWS: list[tuple[list[list[Row]], list[list[Row]]]] = [
    ([make_rows([9, 4], seed=1), make_rows([17], seed=2)], [make_rows([3, 11, 6], seed=3)]),  # uneven shares
    ([make_rows([8], seed=4)], [NO_TARGETS]),  # a share without a target
    ([NO_TARGETS], [NO_TARGETS]),  # no target anywhere
]
"""For each window the micro-batches of rank 0 and of rank 1."""


def gradients(shares: list[list[list[Row]]]) -> tuple[dict[str, torch.Tensor], int, float]:
    """Gradients, targets and loss of the window whose micro-batches are these."""
    model = tiny_model(dtype=torch.float64)
    window = [padded(rows) for share in shares for rows in share]
    stats = window_gradients(model, window, TrainConfig())
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return grads, stats.targets, stats.loss


def cards_of_two_kinds() -> list[dict[str, Any]]:
    """Two cards, of which the second has less memory, and another speed."""
    return [
        {"name": "NVIDIA H200", "free": 40 * GIB, "count": 132, "capability": (9, 0)},
        {"name": "NVIDIA GeForce RTX 4080", "free": 9 * GIB, "count": 76, "capability": (8, 9)},
    ]


def chosen_on(card: dict[str, Any], rows: int = 16) -> dict[str, Any]:
    """What a run chooses whose steps need what the arithmetic says, on a card of this kind."""
    shape = SHAPES["mistral-7b"].fields()
    parameter = types.SimpleNamespace(device=torch.device("cuda", 0), requires_grad=False, grad=None)
    base = types.SimpleNamespace(to_dict=lambda: shape)
    model: Any = types.SimpleNamespace(parameters=lambda: iter([parameter]), config=base)
    seen = types.SimpleNamespace(
        name=card["name"], major=card["capability"][0], minor=card["capability"][1], multi_processor_count=card["count"]
    )
    needed = [0]

    def run(_: Any, config: RunConfig) -> bool:
        needed[0] = estimate(config, shape).allocated_bytes
        return needed[0] <= 0.97 * card["free"]

    faked = {
        "mem_get_info": lambda _: (card["free"], card["free"]),
        "memory_reserved": lambda _: 0,
        "memory_allocated": lambda _: 4 * GIB,
        "max_memory_reserved": lambda _: needed[0],
        "get_device_properties": lambda _: seen,
    }
    with contextlib.ExitStack() as stack:
        for name, function in faked.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        stack.enter_context(mock.patch.object(split._Trials, "_run", run))
        stack.enter_context(mock.patch.object(split, "_tidy"))
        stack.enter_context(mock.patch.object(split, "why_the_split_matters", return_value=None))
        stack.enter_context(mock.patch.object(split, "layers_of", return_value=[None] * 32))
        data = FullRows(count=rows, tokens=512, vocabulary=100)
        found = split.chosen_split(model, data, RunConfig(train=TrainConfig(accumulation=rows)))
    needs = estimate(yaml_file.replace(found.config, {"device": "cuda", "model": "mistral-7b"}), shape).allocated_bytes
    train = found.config.train
    return {
        "choice": [train.micro_batch, train.accumulation, train.checkpointing, train.offload_activations],
        "note": found.note,
        "fits": needs <= 0.97 * card["free"],
    }


def main() -> None:
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results = [gradients([window[rank]]) for window in WINDOWS]
    torch.save(results, f"{out}.{rank}")
    Path(f"{out}.{rank}.json").write_text(json.dumps(chosen_on(cards_of_two_kinds()[rank])))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
