"""Whose bytes a peak is made of: what was freed before it is not in it, and a loss is known anywhere in the stack."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from finetune import attribution, loss

LOSS = str(loss.__file__)


def event(action: str, address: int, size: int, *files: str) -> dict[str, Any]:
    frames = [{"filename": file, "name": "f", "line": 1} for file in (*files, "train.py")]
    return {"action": action, "addr": address, "size": size, "frames": frames}


def test_what_was_freed_before_the_peak_is_not_in_it() -> None:
    events = [
        event("alloc", 1, 100),
        event("free_requested", 1, 100),
        event("alloc", 2, 130),
        event("free_requested", 2, 130),
    ]
    assert attribution.classify(events, set()) == {"gradients": 0, "logits": 0, "activations": 130}


def test_what_the_loss_calls_for_is_the_losses_however_deep() -> None:
    events = [event("alloc", 1, 100, "functional.py", LOSS, "accumulate.py"), event("alloc", 2, 30, "functional.py")]
    assert attribution.classify(events, set()) == {"gradients": 0, "logits": 100, "activations": 30}


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
    found = attribution.classify(events, {address for address in range(len(sizes)) if address % 3 == 0})
    assert sum(found.values()) == peak
