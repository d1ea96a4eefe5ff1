"""Attention goes where the card would send it, and so does its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

# bfloat16 causal, bfloat16 with a mask, float32 causal; and the growth of a step's peak when the length doubles.
CARDS = {
    "t4": ("MATH", "MATH", "EFFICIENT_ATTENTION", 4),
    "rtx-4080": ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "EFFICIENT_ATTENTION", 2),
    "h100-80": ("CUDNN_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", 2),
    "b200": ("CUDNN_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", 2),
}


@pytest.mark.parametrize("card", CARDS)
def test_attention_is_the_cards(run_program: Callable[..., dict[str, Any]], card: str) -> None:
    causal, masked, single, growth = CARDS[card]
    found = run_program("attention.py", gpu=card)
    assert found["chosen"]["bfloat16 causal"] == causal
    assert found["chosen"]["bfloat16 masked"] == masked
    assert found["chosen"]["float32 causal"] == single
    assert found["growth"] == pytest.approx(growth, rel=0.1)
