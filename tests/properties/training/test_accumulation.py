"""Any split of any window gives the full batch's gradient: that of each row alone, unpadded, summed, divided by N."""

from __future__ import annotations

from dataclasses import dataclass, replace
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

from finetune.config.settings import TrainConfig
from finetune.model.checks import why_the_split_matters
from finetune.training.accumulate import window_gradients

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


def measure(
    model: Any, batches: list[Any], accumulate: Any = window_gradients, **settings_of_run: Any
) -> tuple[Any, list[torch.Tensor | None]]:
    model.zero_grad(set_to_none=True)
    stats = accumulate(model, batches, TrainConfig(**{"checkpointing": False} | settings_of_run))
    return stats, [parameter.grad for parameter in model.parameters()]


def held_to_the_truth(
    pair: Pair,
    dtype: torch.dtype,
    rows: list[Row],
    batches: list[Any],
    accumulate: Any = window_gradients,
    **settings_of_run: Any,
) -> None:
    loss, exact = row_by_row_gradients(pair.truth, rows, list(pair.truth.parameters()))
    stats, measured = measure(pair.model, batches, accumulate, **settings_of_run)
    assert stats.targets == targets_of(rows)
    if stats.targets:
        assert relative_l2(measured, exact) <= BOUNDS[dtype]
        assert stats.loss == pytest.approx(loss, rel=max(BOUNDS[dtype], 1e-6))
    else:
        assert all(grad is None or not grad.any() for grad in measured)
    assert stats.tokens == sum(len(ids) for ids, _ in rows)


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


def mean_of_means(model: Any, window: list[Any], config: TrainConfig) -> Any:
    """What most trainers did until 2024: its loss looks right and its gradient is not."""
    for batch in window:
        window_gradients(model, [batch], config)
    return of_the_window(model, window, config, 1 / len(window))


def of_the_window(model: Any, window: list[Any], config: TrainConfig, share: float) -> Any:
    """The gradients that are there times ``share``, and the right figures beside them."""
    grads = [None if p.grad is None else p.grad * share for p in model.parameters()]
    stats = window_gradients(model, window, config)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad
    return stats


def a_share_for_each(model: Any, window: list[Any], config: TrainConfig) -> Any:
    """The last, partial window divided as if it had its six micro-batches."""
    window_gradients(model, window, config)
    return of_the_window(model, window, config, len(window) / 6)


def without_the_last(model: Any, window: list[Any], config: TrainConfig) -> Any:
    window_gradients(model, window[:-1], config)
    targets = [sum(batch.targets for batch in part) for part in (window[:-1], window)]
    return of_the_window(model, window, config, targets[0] / targets[1])


def divided_by_none(model: Any, window: list[Any], config: TrainConfig) -> Any:
    """The sum of no loss over no target."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return of_the_window(model, window, config, float("nan"))


@DTYPES
@pytest.mark.parametrize("mistaken", [mean_of_means, a_share_for_each, without_the_last])
def test_the_check_rejects_a_mistaken_accumulation(
    models: dict[torch.dtype, Pair], dtype: torch.dtype, mistaken: Any
) -> None:
    rows = make_rows([24, 3, 9, 17], seed=1, supervised=0.6)
    batches = [padded([row]) for row in rows]
    held_to_the_truth(models[dtype], dtype, rows, batches)
    with pytest.raises(AssertionError, match="relative_l2"):
        held_to_the_truth(models[dtype], dtype, rows, batches, mistaken)


def test_the_check_rejects_what_a_window_without_a_target_must_not_leave(models: dict[torch.dtype, Pair]) -> None:
    rows = [(ids, [IGNORED] * len(ids)) for ids, _ in make_rows([4, 7])]
    with pytest.raises(AssertionError, match="all"):
        held_to_the_truth(models[torch.float32], torch.float32, rows, [padded(rows)], divided_by_none)


def seeing_padding(rows: list[Row]) -> Any:
    batch = padded(rows, side="left")
    return replace(batch, attention_mask=torch.ones_like(batch.input_ids), position_ids=None)


def labels_one_late(rows: list[Row]) -> Any:
    batch = padded(rows, extra=1)
    return replace(batch, labels=batch.labels.roll(1, dims=1))


def in_one_row(rows: list[Row]) -> Any:
    batch = packed(rows)
    return replace(batch, position_ids=torch.arange(batch.input_ids.shape[1])[None])


@DTYPES
@pytest.mark.parametrize("mistaken", [seeing_padding, labels_one_late, in_one_row])
def test_the_check_rejects_a_mistaken_batch(models: dict[torch.dtype, Pair], dtype: torch.dtype, mistaken: Any) -> None:
    rows = make_rows([12, 9, 15], seed=2)
    with pytest.raises(AssertionError, match="relative_l2"):
        held_to_the_truth(models[dtype], dtype, rows, [mistaken(rows)])


def test_the_mean_of_means_and_rows_that_see_each_other_are_far_off(models: dict[torch.dtype, Pair]) -> None:
    model = models[torch.float64].model
    rows = make_rows([24, 3, 9, 2, 17, 4], seed=1, supervised=0.6)
    _, exact = row_by_row_gradients(model, rows, list(model.parameters()))
    _, of_means = measure(model, [padded([row]) for row in rows], mean_of_means)
    _, together = measure(model, [in_one_row(rows)])
    assert relative_l2(of_means, exact) > 1e-2
    assert relative_l2(together, exact) > 1e-2


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


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("llama", {}, None),
        ("mixtral", {}, None),
        ("llama", {"attention_dropout": 0.2}, "this llama model has dropout of its own"),
        ("mixtral", {"router_jitter_noise": 0.1}, "this mixtral model has dropout of its own"),
        ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.5}, "router's loss of this mixtral model"),
    ],
    ids=str,
)
def test_a_split_matters_where_it_is_said_to_and_nowhere_else(
    kind: str, changes: dict[str, Any], said: str | None
) -> None:
    """A base's own dropout is on in training, as with any trainer; what it draws is another thing for another split."""
    eager = {"experts_implementation": "eager"} if kind == "mixtral" else {}
    model = tiny_model(kind, dtype=torch.float64, **eager | changes)
    before = torch.get_rng_state()
    found = why_the_split_matters(model)
    assert (found is None) if said is None else (said in str(found))
    assert torch.equal(torch.get_rng_state(), before)
    rows = make_rows([9, 5, 7, 12], supervised=1.0)
    grads = []
    for parts in ([rows], [rows[:1], rows[1:]], [rows]):
        torch.manual_seed(0)
        measured = measure(model, [padded(part) for part in parts])[1]
        grads.append(
            [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), measured, strict=True)]
        )
    off = relative_l2(grads[1], grads[0])
    assert off <= 1e-12 if said is None else off > 1e-4
    assert relative_l2(grads[2], grads[0]) == 0.0  # one split and one seed: one gradient


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
