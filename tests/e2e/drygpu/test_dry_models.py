"""Any causal language model of transformers trains on a dry GPU, along the path that a real card would take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

FAMILIES = ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Phi", "Phi3", "GPT2")


@pytest.fixture(scope="module")
def models(run_program: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return run_program("models.py")


def value(results: dict[str, Any], name: str) -> Any:
    assert "error" not in results[name], results[name]["error"]
    return results[name]["value"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_and_asks_nothing_unanswered(models: dict[str, Any], family: str) -> None:
    assert value(models, family) == {"trained": True, "unanswered": []}


def test_a_mask_of_ones_keeps_flash_attention(models: dict[str, Any]) -> None:
    peaks = value(models, "full_mask_keeps_flash")
    assert peaks["ones"] == peaks["none"]
    assert peaks["padded"] > peaks["ones"]


def test_packed_positions_are_seen(models: dict[str, Any]) -> None:
    peaks = value(models, "packed_positions_are_found")
    assert peaks["two"] > peaks["one"], "no mask was built between the two samples"


def test_experts_are_hit_evenly_and_the_guess_is_labelled(models: dict[str, Any]) -> None:
    notes = value(models, "mixtral_experts_one_by_one")
    assert [True, "indices taken as spread evenly (a router's experts, sampled tokens)"] in notes
    assert all(answered for answered, _ in notes)


def test_each_attention_backend_runs_when_chosen(models: dict[str, Any]) -> None:
    assert value(models, "chosen_backends") == ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]


def test_generation(models: dict[str, Any]) -> None:
    assert value(models, "generation") == [[2, 13], [2, 13]]


ATTENTION = """
import torch
q = torch.randn(1, 4, 1024, 64, device="cuda", dtype=torch.{dtype})
before = torch.cuda.memory_allocated()
torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
print((torch.cuda.max_memory_allocated() - before) / q.nbytes)
"""


@pytest.mark.parametrize(
    ("gpu", "dtype", "quadratic"),
    [("t4", "bfloat16", True), ("t4", "float16", False), ("l4", "bfloat16", False), ("l4", "float64", True)],
)
def test_attention_is_the_one_the_card_would_choose(
    dry_python: Callable[..., Any], gpu: str, dtype: str, quadratic: bool
) -> None:
    """A T4 has neither flash nor memory-efficient kernels for bfloat16: scores of 1024 x 1024 are really allocated."""
    done = dry_python("-c", ATTENTION.format(dtype=dtype), gpu=gpu)
    assert done.returncode == 0, done.stderr
    assert (float(done.stdout) > 16) is quadratic
