"""Who gets a gradient, and which: the adapter's parameters alone, all of them, as over a dense fp32 model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bitsandbytes
import pytest
import torch
from adapted_models import ADAPTER, PRECISIONS, adapted, base_of, gradients, nonzero_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import nf4
from tiny_models import relative_l2, save_tiny
from weight_blocks import make_weights, same_bits

from finetune.config.settings import AdapterConfig
from finetune.model.load import attach_adapter
from finetune.model.merge import take_over_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft 0.21
FEW = settings(max_examples=max(5, settings.default.max_examples // 10))
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def held_to_the_adapter(model: Any, linear: int, **changes: Any) -> None:
    """A and B of each of ``linear`` layers get a gradient that is not zero, and nothing else gets one."""
    grads = gradients(model, **changes)
    lora = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(lora) == 2 * linear
    assert grads.keys() == lora
    assert [name for name, grad in grads.items() if not (grad.any() and grad.isfinite().all())] == []


@pytest.mark.parametrize("precision", PRECISIONS)
@given(
    targets=st.sets(st.sampled_from(LINEAR), min_size=1).map(sorted),
    rank=st.integers(1, 6),
    rslora=st.booleans(),
    checkpointing=st.booleans(),
)
@FEW
def test_all_of_the_adapter_and_nothing_else_gets_a_gradient(
    folder: Path, precision: str, targets: list[str], rank: int, rslora: bool, checkpointing: bool
) -> None:
    adapter = AdapterConfig(rank=rank, alpha=8.0, rslora=rslora, targets=tuple(targets))
    model = nonzero_adapter(adapted(folder, precision, adapter))
    held_to_the_adapter(model, LAYERS * len(targets), checkpointing=checkpointing)


def a_norm_is_trained(model: Any) -> None:
    model.get_base_model().model.norm.weight.requires_grad_(True)


def an_a_is_frozen(model: Any) -> None:
    model.get_base_model().model.layers[1].mlp.up_proj.lora_A["default"].weight.requires_grad_(False)


def a_layer_leaves_its_adapter_out(model: Any) -> None:
    model.get_base_model().model.layers[0].self_attn.v_proj.scaling["default"] = 0.0


def checkpoints_are_reentrant(model: Any) -> None:
    """The first layer's input needs no gradient, so that this kind of checkpoint gives its adapter none, in silence."""
    base = model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": True})
    base.disable_input_require_grads()  # what transformers 5 has turned on for its sake


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize(
    "mistake", [a_norm_is_trained, an_a_is_frozen, a_layer_leaves_its_adapter_out, checkpoints_are_reentrant]
)
def test_the_check_rejects_one_too_many_and_one_too_few(folder: Path, mistake: Callable[[Any], None]) -> None:
    model = nonzero_adapter(adapted(folder))
    held_to_the_adapter(model, LAYERS * len(LINEAR), checkpointing=False)
    mistake(model)
    with pytest.raises(AssertionError, match=r"lora_|norm"):
        held_to_the_adapter(model, LAYERS * len(LINEAR), checkpointing=True)


def test_in_the_first_step_every_b_has_a_gradient_and_every_a_has_zero(folder: Path) -> None:
    grads = gradients(adapted(folder))
    assert all(grad.any() for name, grad in grads.items() if "lora_B" in name)
    assert not any(grad.any() for name, grad in grads.items() if "lora_A" in name)  # through B = 0


def dense_twin(folder: Path, quantized: Any) -> Any:
    """An fp32 model with the decoded weights, and the same adapter."""
    dense = base_of(folder, "fp32")
    assert take_over_weights(dense, quantized) > 0
    twin = attach_adapter(dense, ADAPTER, seed=0)
    own = dict(quantized.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_" in name:
                parameter.copy_(own[name])
    return twin


@pytest.mark.parametrize("precision", ["fp4", "nf4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_adapters_gradient_is_that_of_the_dense_model(folder: Path, precision: str, double_quant: bool) -> None:
    model = nonzero_adapter(adapted(folder, precision, double_quant=double_quant))
    grads, exact = gradients(model), gradients(dense_twin(folder, model))
    assert grads.keys() == exact.keys()
    assert relative_l2([grads[n] for n in exact], list(exact.values())) <= 1e-6
    other = nonzero_adapter(adapted(folder, "fp32"))  # the control: the weights as they were before quantization
    assert relative_l2([gradients(other)[n] for n in exact], list(exact.values())) > 1e-2


def linear4bit(weight: Tensor, *, bias: bool, quant_type: str, double_quant: bool) -> Any:
    out_features, in_features = weight.shape
    layer = bitsandbytes.nn.Linear4bit(
        in_features, out_features, bias=bias, quant_type=quant_type, compress_statistics=double_quant
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type=quant_type, compress_statistics=double_quant
    )
    return layer.to("cpu")


def held_to_the_dense_layer(layer: Callable[[Tensor], Tensor], dense: Tensor, bias: Tensor | None, x: Tensor) -> None:
    """Forward bit for bit, and backward up to the order of the sums."""
    outputs = []
    for run in (layer, lambda v: torch.nn.functional.linear(v, dense, bias)):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y).cumsum(-1))
        outputs.append((y.detach(), grad))
    (forward, backward), (exact_forward, exact_backward) = outputs
    assert same_bits(forward, exact_forward)
    assert torch.allclose(backward, exact_backward, rtol=1e-5, atol=1e-4)


@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    bias=st.booleans(),
    out_features=st.integers(1, 70),
    blocks=st.integers(1, 2),
    double_quant=st.booleans(),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=settings.default.max_examples)
def test_linear4bit_is_the_dense_layer_forward_and_backward(
    batch: int, tokens: int, bias: bool, out_features: int, blocks: int, double_quant: bool, quant_type: str, seed: int
) -> None:
    weight = make_weights("normal", out_features * 64 * blocks, seed=seed).view(out_features, 64 * blocks)
    layer = linear4bit(weight, bias=bias, quant_type=quant_type, double_quant=double_quant)
    dense = nf4.dequantize(nf4.quantize(weight, quant_type=quant_type, double_quant=double_quant))  # type: ignore[arg-type]  # one of the Literal's values
    x = make_weights("normal", batch * tokens * 64 * blocks, seed=seed + 1).view(batch, tokens, 64 * blocks)
    held_to_the_dense_layer(layer, dense, layer.bias, x)


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("one code is its neighbour", "same_bits"),
        ("the scales are not quantized", "same_bits"),
        ("no bias", "same_bits"),
        ("a backward through the weight before quantization", "allclose"),
        ("a backward off by a part in 10,000", "allclose"),
    ],
)
def test_the_check_rejects_another_layer_and_another_backward(mistake: str, said: str) -> None:
    weight = make_weights("normal", 24 * 64, seed=1).view(24, 64)
    layer = linear4bit(weight, bias=True, quant_type="nf4", double_quant=True)
    dense, bias = nf4.dequantize(nf4.quantize(weight, double_quant=True)), layer.bias
    x = make_weights("normal", 3 * 64, seed=2).view(1, 3, 64)
    held_to_the_dense_layer(layer, dense, bias, x)
    run: Callable[[Tensor], Tensor] = layer
    if mistake == "one code is its neighbour":
        layer.weight.data[5] ^= 1
    elif mistake == "the scales are not quantized":
        dense = nf4.dequantize(nf4.quantize(weight))
    elif mistake == "no bias":
        bias = None
    elif mistake == "a backward through the weight before quantization":

        def run(v: Tensor) -> Tensor:
            own = torch.nn.functional.linear(v, weight, bias)
            return layer(v.detach()) + (own - own.detach())

    else:
        layer.register_full_backward_hook(lambda _, grads, __: (grads[0] * (1 + 1e-4),))
    with pytest.raises(AssertionError, match=said):
        held_to_the_dense_layer(run, dense, bias, x)
