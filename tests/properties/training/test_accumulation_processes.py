"""Two real processes give one process's gradient, though their shares differ in targets, or have none.

They also choose the same split on cards that differ.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import one_of_two_processes
import torch
from tiny_models import relative_l2

SCRIPT = Path(one_of_two_processes.__file__)


def test_two_processes_are_one(tmp_path: Path) -> None:
    out = tmp_path / "gradients"
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(tmp_path / "store"), str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    by_rank = [torch.load(f"{out}.{rank}") for rank in range(2)]
    for number, window in enumerate(one_of_two_processes.WINDOWS):
        exact, targets, loss = one_of_two_processes.gradients(list(window))
        for grads, their_targets, their_loss in (by_rank[0][number], by_rank[1][number]):
            assert their_targets == targets
            assert abs(their_loss - loss) <= 1e-12 * max(1.0, loss)
            assert relative_l2([grads[n] for n in exact], list(exact.values())) <= 1e-12
    first, second = (json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(2))
    assert first["choice"] == second["choice"]
    assert first["note"] == second["note"]
    assert second["fits"]  # on the smaller card
    size, accumulation, recomputed, offload = first["choice"]
    assert size * accumulation == 16
    assert accumulation >= 2  # each rank has something to do
    assert recomputed != "auto"
    assert not offload
    alone = one_of_two_processes.chosen_on(one_of_two_processes.cards_of_two_kinds()[0])
    assert alone["choice"][0] > size  # the control: the larger card by itself has room for more


def test_the_mean_over_processes_is_rejected() -> None:
    """The control: each process dividing by its own N, and the gradients averaged, as plain DDP does."""
    first, second = one_of_two_processes.WINDOWS[0]
    exact, _, _ = one_of_two_processes.gradients([first, second])
    means = [one_of_two_processes.gradients([share])[0] for share in (first, second)]
    averaged = [(means[0][n] + means[1][n]) / 2 for n in exact]
    assert relative_l2(averaged, list(exact.values())) > 1e-2
