"""Finds from PyTorch's memory history what the bytes at the peak of a forward and backward pass are used for."""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune.model import loss

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

_MOST_EVENTS = 2_000_000
_LOSS_FILE = str(loss.__file__)


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The events of a device's allocator while it was recorded, and the gradients that were completed."""

    events: list[Mapping[str, Any]]
    """PyTorch's allocation events, the oldest first; empty until the recording ends."""
    gradients: list[tuple[int, int]]
    """For each gradient of a trained parameter: when it was complete, in microseconds since 1970, and its address."""


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[History]:
    """Record the allocations of the current device and the gradients of the model while the block runs.

    If PyTorch records a memory history already, it continues to, and the events from now on are taken from it.

    Yields:
        The history, whose events are complete after the block.
    """
    history = History(events=[], gradients=[])
    kept_already, began = torch._C._cuda_isHistoryEnabled(), _now()

    def note(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            history.gradients.append((_now(), parameter.grad.untyped_storage().data_ptr()))

    hooks = [p.register_post_accumulate_grad_hook(note) for p in model.parameters() if p.requires_grad]
    if not kept_already:
        torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=_MOST_EVENTS)
    try:
        yield history
    finally:
        traces = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
        history.events.extend(event for event in traces if event["time_us"] >= began)
        if not kept_already:
            torch.cuda.memory._record_memory_history(None)
        for hook in hooks:
            hook.remove()


def at_peak(history: History) -> dict[str, int]:
    """Return the bytes at the peak that were allocated since the history began, by category.

    ``gradients`` are the blocks that held a gradient, ``logits`` those that the loss allocated, and ``activations`` all
    others.
    """
    events = history.events
    total = most = peak = 0
    for position, event in enumerate(events):
        if event["action"] == "alloc":
            total += event["size"]
        elif event["action"] == "free_requested":
            total -= event["size"]
        if total > most:
            most, peak = total, position
    alive: dict[int, Mapping[str, Any]] = {}
    for event in events[: peak + 1] if most else ():
        if event["action"] == "alloc":
            alive[event["addr"]] = event
        elif event["action"] == "free_requested":
            alive.pop(event["addr"], None)
    freed: dict[int, float] = {}
    for event in events[peak + 1 :]:
        if event["action"] == "free_requested":
            freed.setdefault(event["addr"], event["time_us"])
    complete = defaultdict(list)
    for when, address in history.gradients:
        complete[address].append(when)
    sizes = dict.fromkeys(("gradients", "logits", "activations"), 0)
    for address, event in alive.items():
        if any(event["time_us"] <= when <= freed.get(address, math.inf) for when in complete[address]):
            sizes["gradients"] += event["size"]
        elif any(frame["filename"] == _LOSS_FILE for frame in event.get("frames", ())):
            sizes["logits"] += event["size"]
        else:
            sizes["activations"] += event["size"]
    return sizes


def _now() -> int:
    return time.time_ns() // 1000
