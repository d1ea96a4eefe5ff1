"""Layers that run fused give the outputs and gradients of peft's own, and say where they cannot."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from adapted_models import adapted, base_of, gradients, nonzero_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_rows, padded, relative_l2, save_tiny
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finetune.config.settings import AdapterConfig, TrainConfig
from finetune.kernels import fused_adapter
from finetune.kernels.fused_adapter import fuse
from finetune.model.load import attach_adapter
from finetune.training.accumulate import window_gradients
from finetune.training.step import evaluate

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft 0.21
FEW = settings(max_examples=max(5, settings.default.max_examples // 10), deadline=None)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def layer(model: Any, name: str, number: int = 0) -> Any:
    return next(m for n, m in model.named_modules() if n.endswith(f"layers.{number}.{name}"))


@pytest.mark.parametrize("precision", ["nf4", "fp4", "fp32"])
@given(
    targets=st.sets(st.sampled_from(LINEAR), min_size=1).map(sorted),
    rank=st.integers(1, 6),
    rslora=st.booleans(),
    checkpointing=st.booleans(),
)
@FEW
def test_gradients_are_those_of_pefts_layers(
    folder: Path, precision: str, targets: list[str], rank: int, rslora: bool, checkpointing: bool
) -> None:
    adapter = AdapterConfig(rank=rank, alpha=8.0, rslora=rslora, targets=tuple(targets))
    plain, fused = (nonzero_adapter(adapted(folder, precision, adapter)) for _ in range(2))
    assert fuse(fused).fused == LAYERS * len(targets)
    exact, found = (gradients(model, checkpointing=checkpointing) for model in (plain, fused))
    assert found.keys() == exact.keys()
    assert relative_l2([found[name] for name in exact], list(exact.values())) <= 3e-5


def test_a_gradient_of_another_scale_is_noticed(folder: Path) -> None:
    """The control of the bound above."""
    plain, fused = (nonzero_adapter(adapted(folder)) for _ in range(2))
    fuse(fused)
    layer(fused, "self_attn.k_proj").scaling["default"] *= 1.01
    exact, found = gradients(plain), gradients(fused)
    assert relative_l2([found[name] for name in exact], list(exact.values())) > 1e-4


def test_an_adapter_of_zeros_leaves_the_base_as_it_is_bit_for_bit(folder: Path) -> None:
    batch = padded(make_rows([9, 5], seed=3))
    base = base_of(folder)
    with torch.no_grad():
        before = base(input_ids=batch.input_ids).logits
        model = attach_adapter(base, AdapterConfig(rank=4), seed=0)
        assert fuse(model).fused
        assert torch.equal(model(input_ids=batch.input_ids).logits, before)


def test_an_evaluation_is_pefts(folder: Path) -> None:
    batch = padded(make_rows([9, 5], seed=3))
    plain, fused = (nonzero_adapter(adapted(folder)) for _ in range(2))
    fuse(fused)
    losses = [evaluate(model, [batch], TrainConfig()).loss for model in (plain, fused)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    with fused.disable_adapter(), plain.disable_adapter():
        assert evaluate(fused, [batch], TrainConfig()).loss == evaluate(plain, [batch], TrainConfig()).loss


@pytest.mark.parametrize("names", [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.down_proj",)])
def test_a_model_may_write_into_what_a_layer_returns(folder: Path, names: tuple[str, ...]) -> None:
    """As Llama 4 adds the experts' outputs to that of its shared expert, in place."""
    found = []
    for fused in (False, True):
        model = nonzero_adapter(adapted(folder))
        layers = [layer(model, name) for name in names]
        for base in (each.get_base_layer() for each in layers):
            base.bias = torch.nn.Parameter(torch.linspace(-1, 1, base.out_features), requires_grad=False)
        if fused:
            assert fuse(model).fused
        x = torch.linspace(-1, 1, 10 * layers[0].in_features).view(2, 5, -1).requires_grad_()
        outputs = [each(x).mul_(number).add_(1.0) for number, each in enumerate(layers, start=2)]
        sum(out.square().sum() for out in outputs).backward()  # type: ignore[union-attr]  # a sum of tensors
        found.append([x.grad, *outputs, *(p.grad for each in layers for p in each.parameters() if p.requires_grad)])
    for exact, got in zip(*found, strict=True):
        torch.testing.assert_close(got, exact, atol=1e-5, rtol=1e-4)


def saved_by(call: Any) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda t: t):
        call()
    return kept


def test_a_group_saves_its_input_once_and_multiplies_by_a_once(folder: Path) -> None:
    model = nonzero_adapter(adapted(folder))
    fuse(model)
    attention = layer(model, "self_attn")
    x = torch.randn(2, 7, attention.q_proj.in_features, requires_grad=True)
    kept = saved_by(lambda: [p(x) for p in (attention.q_proj, attention.k_proj, attention.v_proj)])
    assert sum(tensor.data_ptr() == x.data_ptr() for tensor in kept) == 1
    matrices = {p.data_ptr() for p in attention.parameters() if p.requires_grad}
    others = [t for t in kept if t.data_ptr() not in matrices and t.data_ptr() != x.data_ptr()]
    assert [tuple(t.shape) for t in others] == [(14, 3 * 4)]  # x A of three layers of rank 4


def test_a_layer_that_recomputes_does_not_compute_its_last_product_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each weight is decoded forward, again, and backward; the last one of a layer forward and backward."""
    model = nonzero_adapter(adapted(folder))
    fuse(model)
    decoded: Counter[int] = Counter()
    own = fused_adapter._weight
    monkeypatch.setattr(fused_adapter, "_weight", lambda base, dtype: (decoded.update([id(base)]), own(base, dtype))[1])
    gradients(model, checkpointing=True)
    paths = [f"self_attn.{name}" if name[0] in "qkvo" else f"mlp.{name}" for name in LINEAR]
    found = [decoded[id(layer(model, path, LAYERS - 1).get_base_layer())] for path in paths]
    passes = found[-1] // 2
    assert passes
    assert found == [3 * passes] * 6 + [2 * passes]


def test_a_layer_that_goes_on_after_its_last_product_computes_it_again(folder: Path) -> None:
    """As in Gemma 2, where a norm follows: the norm needs the product's values."""
    plain, fused = (layer(nonzero_adapter(adapted(folder)), "mlp.down_proj") for _ in range(2))
    fuse(fused)
    x = torch.randn(2, 5, plain.in_features)
    found = []
    for down in (plain, fused):
        leaf = x.clone().requires_grad_()
        checkpoint(
            lambda y, of: F.rms_norm(of(y.square()), (of.out_features,)), leaf, down, use_reentrant=False
        ).sum().backward()
        found.append([leaf.grad, down.lora_A["default"].weight.grad, down.lora_B["default"].weight.grad])
    for exact, got in zip(*found, strict=True):
        torch.testing.assert_close(got, exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
def test_a_matrix_that_changes_before_the_backward_pass_is_noticed(folder: Path, name: str) -> None:
    attention = layer(nonzero_adapter(adapted(folder)), "self_attn")
    fuse(attention)
    projection = getattr(attention, name)
    out = projection(torch.randn(2, 5, projection.in_features, requires_grad=True))
    with torch.no_grad():
        projection.lora_B["default"].weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="was changed in place"):
        out.sum().backward()


def test_layers_that_read_other_inputs_after_all_run_by_themselves(folder: Path) -> None:
    """As cross-attention does, whose keys and values are another sequence's."""
    plain, fused = (layer(nonzero_adapter(adapted(folder)), "self_attn") for _ in range(2))
    one, other = (torch.randn(1, 5, plain.q_proj.in_features) for _ in range(2))
    fuse(fused)
    for _ in range(2):
        for name, x in (("q_proj", one), ("k_proj", other), ("v_proj", other)):
            exact, found = (getattr(attention, name)(x) for attention in (plain, fused))
            assert torch.allclose(found, exact, atol=1e-6), name


def test_one_output_of_a_group_may_go_unused(folder: Path) -> None:
    plain, fused = (layer(nonzero_adapter(adapted(folder)), "self_attn") for _ in range(2))
    fuse(fused)
    x = torch.randn(1, 5, plain.q_proj.in_features)
    found = []
    for attention in (plain, fused):
        leaf = x.clone().requires_grad_()
        outputs = [attention.q_proj(leaf), attention.k_proj(leaf), attention.v_proj(leaf)]
        (outputs[0].sum() + outputs[2].square().sum()).backward()
        assert (
            attention.k_proj.lora_B["default"].weight.grad is None
            or not attention.k_proj.lora_B["default"].weight.grad.any()
        )
        found.append((leaf.grad, attention.v_proj.lora_A["default"].weight.grad))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (AdapterConfig(rank=4, dropout=0.1), "dropout"),
        (AdapterConfig(rank=4, dora=True), "DoRA"),
        (AdapterConfig(rank=4, adapter_dtype="bf16"), "the adapter is in bfloat16 and the base computes in float32"),
    ],
)
def test_what_cannot_be_fused_runs_as_before_and_is_told(folder: Path, adapter: AdapterConfig, said: str) -> None:
    model = attach_adapter(base_of(folder), adapter, seed=0)
    window = [padded(make_rows([9, 5], seed=3))]
    fusion = fuse(model)
    assert fusion.fused == 0
    assert list(fusion.left.values()) == [LAYERS * len(LINEAR)]
    assert said in str(fusion)
    assert window_gradients(model, window, TrainConfig()).loss > 0


def test_fusing_again_changes_nothing(folder: Path) -> None:
    model = adapted(folder)
    first = fuse(model)
    kept = layer(model, "self_attn.q_proj").forward
    assert fuse(model) == first
    assert layer(model, "self_attn.q_proj").forward is kept
