"""A worst case that random examples miss: question and document share 3,000 tokens, and attend to each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, seed, settings

from pytest_vram.strategies import lengths

HEADS = 64
AS_MANY = settings(max_examples=100, deadline=None, database=None)
PAIRS = lengths(max_tokens=3000, count=2)


def cross_attention(device, question, document):
    """The scores are most where both have half of the tokens: 1,500 times 1,500 for 64 heads, 275 MiB in bf16."""
    return torch.empty(HEADS, question, document, dtype=torch.bfloat16, device=device)


@seed(1)
@AS_MANY
@given(pair=PAIRS)
@pytest.mark.vram(max_mb=260)
def test_at_random(gpu, pair):
    assert cross_attention(gpu.device, *pair).numel() == HEADS * pair[0] * pair[1]


@seed(1)
@AS_MANY
@given(pair=PAIRS)
@pytest.mark.vram(max_mb=260, search=True)
def test_by_climbing(gpu, pair):
    assert cross_attention(gpu.device, *pair).numel() == HEADS * pair[0] * pair[1]
