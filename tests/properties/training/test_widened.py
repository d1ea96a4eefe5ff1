"""On a card rows are padded to a multiple of 16 tokens: no loss, gradient or count changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_rows, padded, relative_l2, tiny_model

from finetune.config.settings import TrainConfig
from finetune.data.batches import Batch
from finetune.data.encode import IGNORED
from finetune.training.accumulate import window_gradients

FEW = settings(max_examples=max(5, settings.default.max_examples // 10), deadline=None)


def taken(model: Any, batch: Batch) -> tuple[list[float], list[torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    stats = window_gradients(model, [batch], TrainConfig(checkpointing="none"))
    return [stats.loss, stats.targets, stats.tokens], [p.grad for p in model.parameters() if p.grad is not None]


@FEW
@given(lengths=st.lists(st.integers(2, 35), min_size=1, max_size=3), multiple=st.sampled_from([2, 16]))
def test_a_wider_batch_comes_to_the_same(lengths: list[int], multiple: int) -> None:
    model = tiny_model(dtype=torch.float64)
    batch = padded(make_rows(lengths, seed=1))
    wider = batch.widened(multiple, None)
    assert wider.input_ids.shape[1] == -(-max(lengths) // multiple) * multiple
    figures, exact = taken(model, batch)
    again, found = taken(model, wider)
    assert again == [pytest.approx(figure, rel=1e-12) for figure in figures]
    assert relative_l2(found, exact) <= 1e-12
    assert int((wider.labels[:, batch.labels.shape[1] :] != IGNORED).sum()) == 0


def test_what_cannot_be_wider_stays_as_it_is() -> None:
    ids = torch.arange(2 * 7).view(2, 7)
    plain = Batch(input_ids=ids, labels=ids)
    assert plain.widened(7, None) is plain
    assert plain.widened(16, 15) is plain
    assert plain.widened(16, 16).input_ids.shape == (2, 16)
    packed = Batch(input_ids=ids, labels=ids, position_ids=torch.arange(7).expand(2, 7) % 4)
    left = Batch(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0))
    assert packed.widened(16, None) is packed
    assert left.widened(16, None) is left
