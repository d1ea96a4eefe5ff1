"""What the bytes at the peak of a forward and backward pass are for, out of PyTorch's memory history."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import torch

from finetune import loss

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

_MOST_EVENTS = 2_000_000
_LOSS_FILE = str(loss.__file__)


@contextlib.contextmanager
def recorded() -> Iterator[list[Mapping[str, Any]]]:
    """Keep a history of the current device's allocations meanwhile; the list is filled when it ends.

    A history that is being kept already goes on, and its events from now on are taken.
    """
    events: list[Mapping[str, Any]] = []
    kept_already, began = torch._C._cuda_isHistoryEnabled(), time.time_ns() // 1000
    if not kept_already:
        torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=_MOST_EVENTS)
    try:
        yield events
    finally:
        traces = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
        events += (event for event in traces if event["time_us"] >= began)
        if not kept_already:
            torch.cuda.memory._record_memory_history(None)


def at_peak(events: Sequence[Mapping[str, Any]], model: nn.Module) -> dict[str, int]:
    """Bytes at the peak that were not there when the history began: ``gradients``, ``logits`` and ``activations``.

    Args:
        events: from :func:`recorded`.
        model: with the gradients that the pass left.
    """
    grads = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
    return classify(events, grads)


def classify(events: Sequence[Mapping[str, Any]], gradients: set[int]) -> dict[str, int]:
    """Find the peak of a history, and sum by purpose what was alive then.

    Args:
        events: of one device, oldest first.
        gradients: addresses that hold a gradient at the end.
    """
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
    freed_later = {event["addr"] for event in events[peak + 1 :] if event["action"] == "free_requested"}
    sizes = dict.fromkeys(("gradients", "logits", "activations"), 0)
    for address, event in alive.items():
        if address in gradients and address not in freed_later:
            sizes["gradients"] += event["size"]
        elif any(frame["filename"] == _LOSS_FILE for frame in event.get("frames", ())):
            sizes["logits"] += event["size"]
        else:
            sizes["activations"] += event["size"]
    return sizes
