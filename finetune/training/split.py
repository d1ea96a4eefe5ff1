"""Chooses how the rows of a step are split into micro-batches on this card.

The gradient of a step does not depend on the split, up to rounding, but its speed does: a card that works on one row at
a time waits for the host most of the time. So a run takes the largest micro-batches for which there is room.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch

from finetune.config import yaml_file
from finetune.data.batches import longest_window
from finetune.kernels.fused_adapter import forget
from finetune.model.checks import why_the_split_matters
from finetune.training import ranks
from finetune.training.accumulate import window_gradients
from finetune.training.optim import state_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from torch import nn

    from finetune.config.settings import RunConfig
    from finetune.data.batches import ExampleSet

MARGIN = 0.03
"""Share of the card that has to stay free beside the longest rows, because memory becomes fragmented over time."""


def as_recorded(config: RunConfig, recorded: Mapping[str, Any]) -> RunConfig:
    """Return the settings of a resumed run with the split that it began with, unless another one is asked for.

    Args:
        config: the settings as they were given.
        recorded: the settings in the checkpoint, by name.
    """
    split = {"micro_batch": int(recorded["micro_batch"]), "accumulation": int(recorded["accumulation"])}
    same = split["micro_batch"] * split["accumulation"] == config.train.micro_batch * config.train.accumulation
    return yaml_file.replace(config, split) if config.train.split == "auto" and same else config


def largest_split(model: nn.Module, train: ExampleSet, config: RunConfig) -> tuple[RunConfig, str | None]:
    """Choose the largest micro-batch for which the card has room, if the settings leave the choice to the run.

    Each candidate divides the rows of a step. It is tried with the longest rows of the data, beside the optimizer's
    states and :data:`MARGIN`. Afterwards there are no gradients, and the caller has to restore the random generators.

    Args:
        model: with its adapter, on its device. On a CPU larger micro-batches are no faster, so nothing is changed.
        train: the training rows.
        config: the settings of the run.

    Returns:
        The settings with the chosen split, and a note for the user; None in place of the note if there was no choice.
    """
    now, device = config.train, next(model.parameters()).device
    rows = now.micro_batch * now.accumulation
    if now.split != "auto" or device.type != "cuda" or rows == 1:
        return config, None
    if ranks.together():  # one process without room would leave the others waiting
        note = f"micro-batches of {now.micro_batch}, as set: with several ranks the split is not chosen (--micro-batch)"
        return config, note
    reason = why_the_split_matters(model)
    if reason is not None:
        return config, f"micro-batches of {now.micro_batch}: {reason}, so that the split is not changed"
    for size in [size for size in range(rows, 0, -1) if rows % size == 0]:
        chosen = yaml_file.replace(config, {"micro_batch": size, "accumulation": rows // size})
        if size == 1:
            break  # the loop tries it, and says what to do if it does not fit
        fits = _fits(model, train, chosen, device)
        _tidy(model)
        if fits:
            break
    note = f"the {rows} rows of a step are computed in micro-batches of {size}, the largest for which there is room"
    return chosen, note


def _fits(model: nn.Module, train: ExampleSet, config: RunConfig, device: torch.device) -> bool:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    states = state_bytes(trained, config.train, masters=not config.adapter.full)
    free = int(MARGIN * torch.cuda.get_device_properties(device).total_memory)
    try:
        held = [torch.empty(size, dtype=torch.uint8, device=device) for size in (states, free)]
        window_gradients(model, longest_window(train, config.train), config.train)
        torch.cuda.synchronize(device)
        del held
    except torch.OutOfMemoryError:
        return False
    return True


def _tidy(model: nn.Module) -> None:
    """Free the memory that a trial left, and reset the peak, which is not that of the run."""
    for parameter in model.parameters():
        parameter.grad = None
    forget(model)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
