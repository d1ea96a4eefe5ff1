"""Memory over time, recorded from training steps: the peak is torch's to the byte, the categories the tensors'."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

UNUSUAL = "roundup_power2_divisions:[4:2,64:8,>:4],max_split_size_mb:40"


@pytest.fixture(scope="module", params=["", "expandable_segments:True", UNUSUAL])
def answers(request: pytest.FixtureRequest, run_program: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return run_program("over_time.py", gpu="rtx-4080", PYTORCH_CUDA_ALLOC_CONF=request.param)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("the_peak_is_torchs", [True, True, True]),
        ("the_peak_is_torchs_with_a_model_from_before", [True, "weights", True]),
        ("adapters_and_quantization_have_their_own", [True, True, True]),
        ("the_segments_are_the_allocators", [True] * 6),
        ("hooks_are_gone_afterwards", [True, True, 0, 0]),
        ("an_out_of_memory_error_is_no_obstacle", True),
    ],
)
def test_the_record_answers(answers: dict[str, Any], question: str, answer: object) -> None:
    assert answers[question].get("value", answers[question]) == answer


def test_each_category_is_the_tensors_it_is_named_after(answers: dict[str, Any]) -> None:
    found = answers["categories_are_the_tensors"]["value"]
    for name in ("weights", "gradients", "optimizer"):
        assert 1 <= found[name] < 1.1, name  # blocks may keep a rest that is too small to split off
    assert found["activations"] == 0  # all were freed by backward
    assert found["logits at most"] == 2  # logits, and their log-softmax


def test_checkpointing_is_seen_to_save_activations(answers: dict[str, Any]) -> None:
    assert answers["checkpointing_saves_activations"]["value"] > 3
