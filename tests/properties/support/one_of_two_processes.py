"""One process of a data-parallel pair: ``python one_of_two_processes.py RANK STORE OUT``.

Runs each window of ``WINDOWS`` with its share of the rows, and rank 0 writes the gradients.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from tiny_models import IGNORED, Row, make_rows, padded, tiny_model

from finetune.config.settings import TrainConfig
from finetune.training.accumulate import window_gradients

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


def main() -> None:
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results = [gradients([window[rank]]) for window in WINDOWS]
    torch.save(results, f"{out}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
