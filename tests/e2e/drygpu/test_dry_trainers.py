"""Whole training loops run to their end on a dry GPU, though every loss reads as zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module")
def trainers(run_program: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_program("trainers.py", str(tmp_path_factory.mktemp("run")))


def value(results: dict[str, Any], name: str) -> Any:
    assert "error" not in results[name], results[name]["error"]
    return results[name]["value"]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("trainer_in_bfloat16", 3),
        ("trainer_with_checkpointing_and_paged_optimizer", 2),
        ("trainer_saves_and_resumes", 3),
        ("sft_trainer", 2),
        ("torch_optimizers", 8),
    ],
)
def test_it_runs_to_its_end(trainers: dict[str, Any], name: str, steps: int) -> None:
    assert value(trainers, name) == steps


def test_the_scaler_finds_no_infinite_gradient(trainers: dict[str, Any]) -> None:
    assert value(trainers, "autocast_and_scaler") == {"scale": 65536.0, "steps": [3]}


def test_no_step_is_skipped_in_float16(trainers: dict[str, Any]) -> None:
    rates = value(trainers, "trainer_in_float16_scales_gradients")
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 3
