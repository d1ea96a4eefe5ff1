"""An 8-bit layer computes what bitsandbytes' own does, and keeps nothing of its input for backward."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import pytest
import torch
from tiny_models import make_rows, padded, save_tiny
from torch.utils.checkpoint import checkpoint

from finetune.config.settings import AdapterConfig, ModelConfig, TrainConfig
from finetune.model.load import attach_adapter, load_base
from finetune.patches.bitsandbytes import FrozenLinear8bit, keep_no_inputs
from finetune.training.step import evaluate

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def layer(bias: bool, threshold: float = 0.0) -> Any:
    """An 8-bit layer of 48 inputs and 32 outputs, frozen."""
    torch.manual_seed(1)
    made = bnb.nn.Linear8bitLt(48, 32, bias=bias, has_fp16_weights=False, threshold=threshold)
    source = torch.nn.Linear(48, 32, bias=bias)
    made.load_state_dict(source.state_dict())
    return made.to("cpu").requires_grad_(False)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48)])
def test_outputs_and_gradients_are_those_of_bitsandbytes(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool, threshold: float
) -> None:
    theirs, ours = layer(bias, threshold), layer(bias, threshold)
    keep_no_inputs(ours)
    assert type(ours) is FrozenLinear8bit
    torch.manual_seed(2)
    x = torch.randn(shape, dtype=torch.float32).to(dtype)
    x[..., 7] = 9.0  # an outlier feature, which LLM.int8() multiplies apart where a threshold is set
    up = torch.randn(*shape[:-1], 32).to(dtype)
    found = []
    for made in (theirs, ours):
        given = x.clone().requires_grad_()
        out = made(given)
        out.backward(up.to(out.dtype))
        found.append((out.detach(), given.grad))
    (their_out, their_grad), (our_out, our_grad) = found
    assert our_out.dtype == their_out.dtype
    assert torch.equal(our_out, their_out)
    assert our_grad is not None
    assert torch.equal(our_grad, their_grad)


def test_without_a_gradient_nothing_changes() -> None:
    theirs, ours = layer(True), layer(True)
    keep_no_inputs(ours)
    x = torch.randn(4, 48)
    assert torch.equal(ours(x), theirs(x))
    assert not ours(x).requires_grad


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "the control"])
def test_checkpointing_lets_go_of_the_input(ours: bool) -> None:
    made = layer(False)
    if ours:
        keep_no_inputs(made)
    inside: list[weakref.ref[torch.Tensor]] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        doubled = x * 2
        inside.append(weakref.ref(doubled))
        return made(doubled)  # type: ignore[no-any-return]  # bitsandbytes is untyped

    out = checkpoint(block, torch.randn(4, 48, requires_grad=True), use_reentrant=False)
    assert (inside[0]() is None) == ours
    out.sum().backward()


def test_a_base_in_8_bits_is_loaded_so(tmp_path: Path) -> None:
    base = load_base(ModelConfig(model=str(save_tiny(tmp_path)), precision="int8", compute_dtype="fp32", device="cpu"))
    kinds = {type(m) for m in base.modules() if isinstance(m, bnb.nn.Linear8bitLt)}
    assert kinds == {FrozenLinear8bit}
    model = attach_adapter(base, AdapterConfig(rank=4), seed=0)
    assert evaluate(model, [padded(make_rows([9, 12]))], TrainConfig()).targets > 0
