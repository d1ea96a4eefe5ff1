"""peft and bitsandbytes run their CUDA code on a dry GPU, and its states are where a real card would have them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

PARAMETERS = 1024 * 1024


@pytest.fixture(scope="module")
def adapters(run_program: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_program("adapters.py", str(tmp_path_factory.mktemp("checkpoint")))


def value(results: dict[str, Any], name: str) -> Any:
    assert "error" not in results[name], results[name]["error"]
    return results[name]["value"]


@pytest.mark.parametrize(
    "name", ["lora", "dora", "rslora_with_dropout", "pissa", "nf4", "fp4", "int8", "nf4_the_usual_way"]
)
def test_an_adapter_gets_its_gradients(adapters: dict[str, Any], name: str) -> None:
    assert value(adapters, name)["all"]


def test_checkpointing_saves_activations(adapters: dict[str, Any]) -> None:
    peaks = value(adapters, "checkpointing")
    assert peaks["reentrant"] < peaks["off"] / 2
    assert peaks["not reentrant"] < peaks["off"] / 2


@pytest.mark.parametrize(
    ("name", "allocated_each", "managed_each"),
    [
        ("AdamW8bit", 2, 0),
        ("AdamW32bit", 8, 0),
        ("Lion8bit", 1, 0),
        ("SGD8bit", 1, 0),
        ("AdEMAMix8bit", 3, 0),
        ("PagedAdamW8bit", 0, 2),
        ("PagedAdamW32bit", 0, 8),
    ],
)
def test_optimizer_states_take_their_bytes(
    adapters: dict[str, Any], name: str, allocated_each: int, managed_each: int
) -> None:
    """Bytes a parameter, beside the scale of each block of 256 values; paged states are managed memory."""
    found = value(adapters, name)
    assert 0 <= found["allocated"] - allocated_each * PARAMETERS < 0.06 * PARAMETERS
    assert found["managed"] == managed_each * PARAMETERS
