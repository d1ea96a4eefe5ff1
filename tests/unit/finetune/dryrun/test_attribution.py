"""Bytes at the peak by category: freed blocks do not count, and the loss is recognised anywhere in the stack."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from finetune.dryrun import attribution
from finetune.model import loss

LOSS = str(loss.__file__)


def event(action: str, address: int, size: int, *files: str) -> dict[str, Any]:
    frames = [{"filename": file, "name": "f", "line": 1} for file in (*files, "train.py")]
    return {"action": action, "addr": address, "size": size, "frames": frames}


def at_peak(events: list[dict[str, Any]], gradients: list[tuple[int, int]] | None = None) -> dict[str, int]:
    """An event's time is its number."""
    timed = [{**one, "time_us": time} for time, one in enumerate(events)]
    return attribution.at_peak(attribution.History(events=timed, gradients=gradients or []))


def test_what_was_freed_before_the_peak_is_not_in_it() -> None:
    events = [
        event("alloc", 1, 100),
        event("free_requested", 1, 100),
        event("alloc", 2, 130),
        event("free_requested", 2, 130),
    ]
    assert at_peak(events) == {"gradients": 0, "logits": 0, "activations": 130}


def test_what_the_loss_calls_for_is_the_losses_however_deep() -> None:
    events = [event("alloc", 1, 100, "functional.py", LOSS, "accumulate.py"), event("alloc", 2, 30, "functional.py")]
    assert at_peak(events) == {"gradients": 0, "logits": 100, "activations": 30}


def test_a_gradient_is_one_from_its_block_to_the_end_of_it() -> None:
    events = [
        event("alloc", 1, 7),
        event("free_requested", 1, 7),
        event("alloc", 1, 100),  # a gradient that stays
        event("alloc", 4, 60),  # one that is put away after the peak
        event("alloc", 2, 50),
        event("free_requested", 2, 50),
        event("alloc", 2, 30),  # an activation, where a gradient was before and comes after
        event("alloc", 3, 500, LOSS),
        event("free_requested", 3, 500),
        event("free_requested", 4, 60),
        event("free_requested", 2, 30),
        event("alloc", 2, 40),
    ]
    complete = [(2, 1), (5, 2), (8, 4), (11, 2)]
    assert at_peak(events, complete) == {"gradients": 160, "logits": 500, "activations": 30}
    assert at_peak(events, [(0, 1)]) == {"gradients": 0, "logits": 500, "activations": 190}


def test_a_history_without_allocations() -> None:
    assert at_peak([]) == {"gradients": 0, "logits": 0, "activations": 0}


@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=12),
    freed=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_the_parts_come_to_the_peak(sizes: list[int], freed: list[bool]) -> None:
    events, held, peak = [], 0, 0
    for address, size in enumerate(sizes):
        events.append(event("alloc", address, size, LOSS if size % 2 else "model.py"))
        held += size
        peak = max(peak, held)
        if freed[address]:
            events.append(event("free_requested", address, size))
            held -= size
    found = at_peak(events, [(len(events), address) for address in range(0, len(sizes), 3)])
    assert sum(found.values()) == peak
