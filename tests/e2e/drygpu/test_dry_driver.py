"""The driver beneath: capacity, NVML, pinned and managed memory, streams, graphs, cuDNN, and honest refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module")
def answers(run_program: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return run_program("driver_calls.py", gpu="rtx-4090", count=2)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("context", True),
        ("filled to the last granule", True),
        ("out of memory", "CUDA out of memory"),
        ("refused", 2),  # once, and once more after the cache was flushed
        ("given back", True),
        ("nvml used", True),
        ("nvml v2", True),
        ("nvml processes", True),
        ("nvml uuid", True),
        ("nvml fabric", [True, 0]),
        ("nvml count", 2),
        ("torch through nvml", True),
        ("pinned", True),
        ("there and back", True),
        ("managed", True),
        ("managed given back", True),
        ("a gigabyte to the host", True),
        ("zeros to the host", [0, 35]),  # the five bytes around the copy keep their sevens
        ("pinned copy of zeros", True),
        ("pinned copy of values", True),
        ("memory that is not pinned", 0),
        ("streams", True),
        ("peers", True),
        ("between devices", [3, 1]),
        ("graph", [64, 64]),
        ("convolution", [2, 3, 32, 32]),
        ("attention", [1, 4, 64, 64]),
        ("textures", True),
    ],
)
def test_the_driver_answers(answers: dict[str, Any], question: str, answer: object) -> None:
    assert answers[question] == answer


def test_a_full_card_costs_the_host_nothing(answers: dict[str, Any]) -> None:
    """24 GB of device memory were allocated; the host holds Python, PyTorch, and next to nothing more."""
    assert answers["host MiB"] < 1500
