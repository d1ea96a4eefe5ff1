"""Any split of any window gives the full batch's gradient: that of each row alone, unpadded, summed, divided by N."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    IGNORED,
    Row,
    make_rows,
    packed,
    padded,
    relative_l2,
    row_by_row_gradients,
    targets_of,
    tiny_model,
)

from finetune.accumulate import window_gradients
from finetune.config import TrainConfig

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
FEW = settings(max_examples=settings.default.max_examples // 3)
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A model, and the same weights in fp64: the truth about it."""

    model: Any
    truth: Any


@pytest.fixture(scope="module")
def models() -> dict[torch.dtype, Pair]:
    made = {}
    for dtype in BOUNDS:
        model = tiny_model(dtype=dtype)
        truth = tiny_model(dtype=torch.float64)
        truth.load_state_dict(model.state_dict())
        made[dtype] = Pair(model=model, truth=truth)
    return made


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[Row], list[int]]:
    """Rows of any lengths, and the sizes of the micro-batches they are split into; the first row may have no target."""
    lengths = draw(st.lists(st.integers(1, 24), min_size=1, max_size=10))
    rows = make_rows(lengths, seed=draw(st.integers(0, 2**16)), supervised=draw(st.sampled_from([0.1, 0.5, 1.0])))
    cuts = sorted(draw(st.sets(st.integers(1, len(rows)), max_size=4)) | {0, len(rows)})
    return rows, cuts


CHUNKS = (1, 7, 1024)


def measure(model: Any, batches: list[Any], **settings_of_run: Any) -> tuple[Any, list[torch.Tensor | None]]:
    model.zero_grad(set_to_none=True)
    stats = window_gradients(model, batches, TrainConfig(**{"checkpointing": False} | settings_of_run))
    return stats, [parameter.grad for parameter in model.parameters()]


def held_to_the_truth(
    pair: Pair, dtype: torch.dtype, rows: list[Row], batches: list[Any], **settings_of_run: Any
) -> None:
    loss, exact = row_by_row_gradients(pair.truth, rows, list(pair.truth.parameters()))
    stats, measured = measure(pair.model, batches, **settings_of_run)
    assert stats.targets == targets_of(rows)
    assert stats.tokens == sum(len(ids) for ids, _ in rows)
    if not stats.targets:
        assert all(grad is None or not grad.any() for grad in measured)
        return
    assert relative_l2(measured, exact) <= BOUNDS[dtype]
    assert stats.loss == pytest.approx(loss, rel=max(BOUNDS[dtype], 1e-6))


@DTYPES
@given(
    window=windows(),
    side=st.sampled_from(["right", "left"]),
    extra=st.integers(0, 5),
    chunk=st.sampled_from(CHUNKS),
    checkpointing=st.booleans(),
)
@FEW
def test_any_split_and_padding_gives_the_full_batchs_gradient(
    models: dict[torch.dtype, Pair],
    dtype: torch.dtype,
    window: tuple[list[Row], list[int]],
    side: str,
    extra: int,
    chunk: int,
    checkpointing: bool,
) -> None:
    rows, cuts = window
    batches = [padded(rows[a:b], side=side, extra=extra) for a, b in pairwise(cuts)]
    held_to_the_truth(models[dtype], dtype, rows, batches, loss_chunk=chunk, checkpointing=checkpointing)


@DTYPES
@given(window=windows())
@FEW
def test_packing_gives_the_full_batchs_gradient(
    models: dict[torch.dtype, Pair], dtype: torch.dtype, window: tuple[list[Row], list[int]]
) -> None:
    rows, cuts = window
    batches = [packed(rows[a:b]) for a, b in pairwise(cuts)]
    held_to_the_truth(models[dtype], dtype, rows, batches)


@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4))
@FEW
def test_a_window_without_a_target_leaves_no_gradient(models: dict[torch.dtype, Pair], lengths: list[int]) -> None:
    rows = [(ids, [IGNORED] * len(ids)) for ids, _ in make_rows(lengths)]
    held_to_the_truth(models[torch.float32], torch.float32, rows, [padded([row]) for row in rows])


def test_a_label_on_a_rows_first_token_is_no_target(models: dict[torch.dtype, Pair]) -> None:
    rows = [([3, 4, 5], [3, IGNORED, IGNORED]), ([6, 7], [IGNORED, 7])]
    held_to_the_truth(models[torch.float64], torch.float64, rows, [padded(rows)])


def test_the_mean_of_means_is_rejected(models: dict[torch.dtype, Pair]) -> None:
    """The control: what most trainers did until 2024. Its loss looks right and its gradient is not."""
    model = models[torch.float64].model
    rows = make_rows([24, 3, 9, 2, 17, 4], seed=1, supervised=0.6)
    _, exact = row_by_row_gradients(model, rows, list(model.parameters()))
    mean_of_means = [torch.zeros_like(p) for p in model.parameters()]
    for row in rows:
        _, grads = row_by_row_gradients(model, [row], list(model.parameters()))
        for held, grad in zip(mean_of_means, grads, strict=True):
            held += grad / len(rows)
    assert relative_l2(mean_of_means, exact) > 1e-2
    _, measured = measure(model, [padded([row]) for row in rows])
    assert relative_l2(measured, exact) <= 1e-12


def test_packing_without_separation_is_rejected(models: dict[torch.dtype, Pair]) -> None:
    """The control: rows that see each other give another gradient."""
    model = models[torch.float64].model
    rows = make_rows([12, 9, 15], seed=2)
    _, exact = row_by_row_gradients(model, rows, list(model.parameters()))
    batch = packed(rows)
    together = type(batch)(
        input_ids=batch.input_ids,
        labels=batch.labels,
        attention_mask=torch.ones_like(batch.input_ids),
        position_ids=torch.arange(batch.input_ids.shape[1])[None],
    )
    _, measured = measure(model, [together])
    assert relative_l2(measured, exact) > 1e-2


@pytest.mark.parametrize(("side", "masked"), [("right", False), ("left", True)])
def test_only_padding_on_the_left_asks_for_a_mask(models: dict[torch.dtype, Pair], side: str, masked: bool) -> None:
    """With a mask attention takes a slower kernel, which needs more memory; rows padded on the right do without."""
    model = models[torch.float32].model
    given: list[bool] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, __, arguments: given.append(arguments.get("attention_mask") is not None), with_kwargs=True
    )
    measure(model, [padded(make_rows([5, 9]), side=side)])
    hook.remove()
    assert given == [masked]


@pytest.mark.parametrize(("checkpointing", "times"), [(False, 1), (True, 2)])
def test_with_checkpointing_a_layer_is_computed_again_in_backward(
    models: dict[torch.dtype, Pair], checkpointing: bool, times: int
) -> None:
    model = models[torch.float32].model
    calls: list[Any] = []
    hook = model.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *given: calls.append(given))
    measure(model, [padded(make_rows([5, 9]))], checkpointing=checkpointing)
    hook.remove()
    assert len(calls) == times


def inputs(batch: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def test_mixtrals_router_loss_splits_as_documented() -> None:
    """The router's balance loss is a product of batch means, so that it does not decompose.

    With it off any split is exact. With it on, what is promised is the mean over the micro-batches' own router losses.
    """

    def gradient(rows_of_batches: list[list[Row]], *, router: bool) -> list[torch.Tensor]:
        model = tiny_model(
            "mixtral",
            dtype=torch.float64,
            output_router_logits=router,
            router_aux_loss_coef=0.5,
            experts_implementation="eager",
        )
        stats, grads = measure(model, [padded(rows) for rows in rows_of_batches])
        assert (stats.router_loss is not None) == router
        if router:
            with torch.no_grad():
                own = [model(**inputs(padded(rows))).aux_loss * 0.5 for rows in rows_of_batches]
            assert stats.router_loss == pytest.approx(float(sum(own)) / len(own), rel=1e-6)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, model.parameters(), strict=True)]

    rows = make_rows([9, 5, 7, 12], seed=0, supervised=1.0)
    parts = [rows[:1], rows[1:]]
    whole, split = gradient([rows], router=False), gradient(parts, router=False)
    assert relative_l2(split, whole) <= 1e-12
    of_router = [
        [on - off for on, off in zip(gradient([part], router=True), gradient([part], router=False), strict=True)]
        for part in parts
    ]
    expected = [g + (a + b) / 2 for g, a, b in zip(whole, *of_router, strict=True)]
    assert relative_l2(gradient(parts, router=True), expected) <= 1e-6  # transformers takes its softmax in fp32
    assert relative_l2(gradient(parts, router=True), gradient([rows], router=True)) > 1e-4  # why it is said
