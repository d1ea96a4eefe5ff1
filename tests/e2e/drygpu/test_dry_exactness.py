"""The allocator on a dry GPU does what it does: the same each time, and just what the driver counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

RunProgram = Callable[..., dict[str, Any]]

SETTINGS = (
    "",
    "expandable_segments:True",
    "max_split_size_mb:64,garbage_collection_threshold:0.6",
    "roundup_power2_divisions:4,large_segment_size_mb:64",
    "backend:cudaMallocAsync",
)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_random_life_repeats_itself_and_agrees_with_the_driver(run_program: RunProgram, settings: str) -> None:
    first = run_program("random_trace.py", "7", "1500", gpu="rtx-4060", PYTORCH_CUDA_ALLOC_CONF=settings)
    again = run_program("random_trace.py", "7", "1500", gpu="rtx-4060", PYTORCH_CUDA_ALLOC_CONF=settings)
    assert first == again
    assert first["disagreements"] == []
    assert first["ooms"] > 0, "the trace is meant to fill the card"
    assert first["left_bytes"] == 0
    assert first["missing"] == []


def test_another_life_is_another_life(run_program: RunProgram) -> None:
    """The negative control: the digest does depend on what the allocator did."""
    one = run_program("random_trace.py", "7", "100", gpu="rtx-4060")
    other = run_program("random_trace.py", "8", "100", gpu="rtx-4060")
    assert one["digest"] != other["digest"]


@pytest.mark.parametrize("settings", ["", "expandable_segments:True"])
def test_a_training_step_is_its_requests(run_program: RunProgram, tmp_path: Path, settings: str) -> None:
    requests = tmp_path / "requests.json"
    step = run_program("record_step.py", str(requests), PYTORCH_CUDA_ALLOC_CONF=settings)
    replay = run_program("replay_step.py", str(requests), PYTORCH_CUDA_ALLOC_CONF=settings)
    assert step["requests"] > 500
    for metric in ("allocated", "reserved", "active"):
        key = f"{metric}_bytes.all.peak"
        assert replay["stats"][key] == step["stats"][key], key
    assert replay["segments"] == step["segments"]
