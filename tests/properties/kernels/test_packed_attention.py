"""Packed rows are what they are alone, whichever way their attention is kept apart, and no row reaches another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from every_causal_lm import tiny_model_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import IGNORED, Row, make_rows, relative_l2, row_by_row_gradients, tiny_model

from finetune.config.settings import TrainConfig
from finetune.data.batches import Batch, Example, collate
from finetune.kernels import packed_attention
from finetune.kernels.packed_attention import keep_rows_apart
from finetune.model.forward import hidden_states
from finetune.model.packed_rows import ROWS_ATTRIBUTE
from finetune.training.accumulate import window_gradients
from pytest_vram.memory.scaling import fit
from pytest_vram.probe.host import HostProbe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

FEW = settings(max_examples=settings.default.max_examples // 20)
WAYS = ("mask", "one by one", "in one kernel")


def varlen_by_the_book(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    key_bounds: Tensor,
    longest: int,
    longest_key: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What the documentation of torch.nn.attention.varlen.varlen_attn says, written down pair by pair."""
    assert torch.equal(bounds, key_bounds)
    assert bounds.dtype == torch.int32
    assert longest == longest_key == int(bounds.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    place = torch.arange(len(query))
    row = torch.bucketize(place, bounds[1:].long(), right=True)
    back = place[:, None] - place[None]
    before, after = window_size
    seen = (row[:, None] == row[None]) & (back <= before if before >= 0 else torch.ones_like(back, dtype=torch.bool))
    if after >= 0:
        seen &= -back <= after
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine whose attention in one kernel is that of the book; the windows with which it is called."""
    windows: list[Any] = []

    def attend(*tensors: Any, **named: Any) -> Tensor:
        windows.append(named["window_size"])
        return varlen_by_the_book(*tensors, **named)

    monkeypatch.setattr(packed_attention, "_varlen", lambda: attend)
    monkeypatch.setattr(packed_attention, "_why_not_here", lambda device, dtype: None)
    return windows


def sequences_of(rows: Sequence[Row], cuts: Sequence[int]) -> Batch:
    """Rows as one batch, a new sequence at each cut."""
    import numpy as np

    made = [
        Example(input_ids=np.array(ids, np.int32), labels=np.array(labels, np.int32), source="") for ids, labels in rows
    ]
    ends = [*cuts, len(rows)]
    lines = [made[begin:end] for begin, end in zip([0, *cuts], ends, strict=True)]
    return collate(lines, 0, packed=True)


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[Row], list[int]]:
    """Rows, and the numbers at which sequences begin: several sequences of several rows, one of them padded."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=2, max_size=7))
    cuts = sorted(draw(st.sets(st.integers(1, len(lengths) - 1), max_size=2)))
    return make_rows(lengths, seed=draw(st.integers(0, 2**16))), cuts


MODELS: dict[str, Any] = {
    "llama": lambda: tiny_model(dtype=torch.float64),
    "windowed": lambda: _windowed(),
}


def _windowed() -> Any:
    """Mistral with a window of four tokens, which most rows are longer than."""
    from transformers import AutoModelForCausalLM, MistralConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4}
    model = AutoModelForCausalLM.from_config(MistralConfig(**sizes, **heads), dtype=torch.float64)
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def told(model: Any, way: str) -> None:
    if way == "mask":
        setattr(model, ROWS_ATTRIBUTE, "mask")
    else:
        said = keep_rows_apart(model)
        assert ("in one kernel" in said) == (way == "in one kernel"), said


@pytest.mark.parametrize("way", ["one by one", "in one kernel"])
@given(packing=packings(), checkpointing=st.booleans())
@FEW
def test_the_gradient_is_that_of_each_row_alone(
    model: Any, way: str, request: pytest.FixtureRequest, packing: tuple[list[Row], list[int]], checkpointing: bool
) -> None:
    windows = request.getfixturevalue("kernel") if way == "in one kernel" else []
    told(model, way)
    windows.clear()
    rows, cuts = packing
    loss, exact = row_by_row_gradients(model, rows, list(model.parameters()))
    model.zero_grad(set_to_none=True)
    batch = sequences_of(rows, cuts)
    stats = window_gradients(model, [batch], TrainConfig(checkpointing=checkpointing, loss_chunk=7))
    assert stats.tokens == sum(len(ids) for ids, _ in rows)
    if stats.targets:
        assert relative_l2([p.grad for p in model.parameters()], exact) <= 1e-6
        assert stats.loss == pytest.approx(loss, rel=1e-6)
    layers, packed = len(model.model.layers), len(batch.row_lengths or ()) > len(batch.input_ids)
    runs = (1 + checkpointing) * layers if packed and stats.targets and way == "in one kernel" else 0
    assert len(windows) == runs


@pytest.mark.parametrize("way", WAYS)
def test_no_row_reaches_another_forward_or_backward(model: Any, way: str, request: pytest.FixtureRequest) -> None:
    if way == "in one kernel":
        request.getfixturevalue("kernel")
    told(model, way)
    model.eval()
    rows = make_rows([5, 9, 7, 6], seed=3)
    batch = sequences_of(rows, [2])
    inputs = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: inputs)
    try:
        states = hidden_states(model, batch).states
    finally:
        handle.remove()
    places = [(line, slice(begin, end)) for line, begin, end in ((0, 0, 5), (0, 5, 14), (1, 0, 7), (1, 7, 13))]
    for line, place in places:
        (grad,) = torch.autograd.grad(states[line, place].square().sum(), inputs, retain_graph=True)
        grad = grad.clone()
        assert grad[line, place].any()
        grad[line, place] = 0.0
        assert not grad.any()


def test_a_window_is_given_to_the_kernel_only_where_a_row_is_longer(kernel: list[Any]) -> None:
    model = _windowed()
    keep_rows_apart(model)
    kernel.clear()
    hidden_states(model, sequences_of(make_rows([4, 4]), []))
    hidden_states(model, sequences_of(make_rows([4, 5]), []))
    assert kernel == [(-1, 0)] * 2 + [(3, 0)] * 2


@pytest.mark.parametrize(
    ("kind", "said", "calls"),
    [
        ("deepseek_v3", "in one kernel", 2),  # its values are narrower than its queries
        ("gemma3_text", "in one kernel", 2),
        ("llama4_text", "in one kernel", 1),  # attention in chunks in one of two layers
        ("gemma2", "computes eager attention", 0),  # caps its scores
        ("gpt_oss", "computes eager attention", 0),  # has sinks
    ],
)
def test_the_kernel_computes_only_what_it_computes_exactly(kernel: list[Any], kind: str, said: str, calls: int) -> None:
    model = tiny_model_of(kind).eval()
    rows = make_rows([24, 40, 17], seed=1)  # longer than the windows and chunks
    with torch.no_grad():
        alone = [hidden_states(model, sequences_of([row], [])).states[0] for row in rows]
        assert said in keep_rows_apart(model)
        kernel.clear()
        states = hidden_states(model, sequences_of(rows, [])).states[0]
    torch.testing.assert_close(states, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert len(kernel) == calls


@pytest.mark.parametrize("kind", ["deepseek_v32", "falcon"])
def test_a_model_whose_attention_cannot_be_told_keeps_its_mask(kind: str) -> None:
    """Sparse attention reads the mask's entries, and would be wrong without an error on rows that are long."""
    model = tiny_model_of(kind).eval()
    assert f"packed rows of this {kind} model are kept apart by a mask" in keep_rows_apart(model)
    assert getattr(model, ROWS_ATTRIBUTE) == "mask"


def test_attention_that_gets_its_arguments_by_name_runs() -> None:
    assert "packed rows" in keep_rows_apart(tiny_model_of("afmoe").eval())


def test_flash_attn_is_told_where_the_rows_of_every_sequence_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """By positions alone, transformers keeps the rows of a single sequence apart, and no others."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def flash(_: Any, *tensors: Tensor, scaling: float, **given: Any) -> tuple[Tensor, None]:
        query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors[:3])
        batch, heads, length, _ = tensors[0].shape
        assert tensors[3:] == (None,)
        bounds = given.get("cu_seq_lens_q", torch.arange(batch + 1, dtype=torch.int32) * length)
        named = {"scale": scaling, "window_size": (-1, 0), "enable_gqa": heads != key.shape[1]}
        longest = [given.get(f"max_length_{side}", length) for side in "qk"]
        found = varlen_by_the_book(query, key, value, bounds, given.get("cu_seq_lens_k", bounds), *longest, **named)
        return found.view(batch, length, heads, -1), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash)
    model = tiny_model(dtype=torch.float64).eval()
    rows = make_rows([5, 9, 7, 6], seed=3)
    with torch.no_grad():
        alone = [hidden_states(model, sequences_of([row], [])).states[0] for row in rows]
        model.config._attn_implementation = "flash_attention_2"
        assert keep_rows_apart(model) == "packed rows attend by themselves, in flash_attention_2"
        states = hidden_states(model, sequences_of(rows, [2])).states
    torch.testing.assert_close(states[0], torch.cat(alone[:2]))
    torch.testing.assert_close(states[1, :13], torch.cat(alone[2:]))


def test_memory_grows_with_the_tokens_and_with_a_mask_with_their_square() -> None:
    sizes = (256, 512, 1024, 2048)
    orders = {}
    for way in WAYS[:2]:
        model = tiny_model(dtype=torch.float32).eval()
        told(model, way)
        peaks = []
        for size in sizes:
            batch = sequences_of(make_rows([64] * (size // 64)), [])
            probe = HostProbe()
            probe.begin_test(record=False)
            with torch.no_grad():
                hidden_states(model, batch)
            probe.end_test()
            peaks.append(probe.peak()[0].requested_bytes)
        orders[way] = fit("tokens", sizes, peaks).order
    assert orders["one by one"] == pytest.approx(1.0, abs=0.05)
    assert orders["mask"] > 1.5


def test_a_label_of_one_row_is_no_target_of_another() -> None:
    batch = sequences_of([([3, 4], [3, 4]), ([5, 6, 7], [5, 6, 7])], [])
    assert batch.labels.tolist() == [[IGNORED, 4, IGNORED, 6, 7]]
    assert batch.row_lengths == (2, 3)
