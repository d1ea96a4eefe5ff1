"""A packed weight is the tensor that bitsandbytes decodes, in every view of it and in everything computed with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from finetune.errors import ModelError
from finetune.model import packed_weight
from finetune.model.packed_weight import PackedWeight, pack, quantized

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPE = (7, 96, 80)  # 53,760 values: three whole groups of 64 * 256 and a part of one


class Experts(nn.Module):
    """Experts with code of their own, which multiplies all at once, and one of them again by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(SHAPE), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(80), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.down) * self.scale + x[0] @ self.down[2]


def experts(*, double_quant: bool = True, quant_type: str = "nf4") -> Any:
    made: Any = Experts()
    pack(made, ["down"], quant_type=quant_type, double_quant=double_quant)
    assert made.down.shape == SHAPE  # before it is read
    made.down = made.quantize("down", torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    return made


@pytest.fixture(scope="module")
def weight() -> PackedWeight:
    found: PackedWeight = experts().down
    return found


VIEWS: list[Callable[[torch.Tensor, int], torch.Tensor]] = [
    lambda w, n: w[n % len(w)],
    lambda w, n: w[torch.tensor(n % len(w))],
    lambda w, n: w.transpose(0, -1),
    lambda w, n: w.view(-1, 40)[n % (w.numel() // 40) :] if w.is_contiguous() and w.numel() % 40 == 0 else w,
    lambda w, n: w[..., n % w.shape[-1] :: 2],
    lambda w, n: w.chunk(2)[-1],
    lambda w, n: list(w.unbind())[n % len(w)],
    lambda w, n: w.unsqueeze(0).expand(2, *w.shape),
    lambda w, n: w.mT if w.dim() > 1 else w,
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(VIEWS), st.integers(0, 10**6)), max_size=3))
def test_every_view_has_the_values_of_the_same_view_of_the_whole(weight: PackedWeight, steps: list[Any]) -> None:
    packed: torch.Tensor = weight
    plain = weight.decoded()
    for view, number in steps:
        if plain.dim() == 0 or not plain.numel():
            break
        packed, plain = view(packed, number), view(plain, number)
        assert isinstance(packed, PackedWeight)
    assert (packed.shape, packed.stride(), packed.dtype) == (plain.shape, plain.stride(), plain.dtype)
    assert torch.equal(packed.clone(), plain)
    assert torch.equal(packed + 1, plain + 1)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [SHAPE, (3, 1), (1, 64 * 256 + 1)])
def test_it_is_what_bitsandbytes_decodes(
    shape: tuple[int, ...], quant_type: str, double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(shape, dtype=torch.bfloat16)
    monkeypatch.setattr(packed_weight, "_PIECE", 2**14)
    packed, _ = quantized(values, quant_type=quant_type, double_quant=double_quant)
    theirs, their_state = bnb.functional.quantize_4bit(
        values.view(-1), blocksize=64, compress_statistics=double_quant, quant_type=quant_type
    )
    assert torch.equal(packed, theirs)
    expected = bnb.functional.dequantize_4bit(theirs, their_state).view(shape)
    module: Any = nn.Module()
    module.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
    pack(module, ["weight"], quant_type=quant_type, double_quant=double_quant)
    module.weight = module.quantize("weight", values)
    assert module.weight.dtype == torch.bfloat16
    assert torch.equal(module.dequantized("weight"), expected)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_module_computes_with_it_and_autograd_keeps_it_packed(double_quant: bool) -> None:
    ours, dense = experts(double_quant=double_quant), Experts()
    dense.down.data.copy_(ours.dequantized("down"))
    kept: list[torch.Tensor] = []
    outs = []
    x = torch.randn(7, 5, 96, requires_grad=True)
    for module in (ours, dense):
        with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            out = module(x)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        outs.append((out.detach(), gradient))
        if module is ours:
            assert sum(isinstance(tensor, PackedWeight) for tensor in kept) == 2
            assert all(tensor.numel() < 5000 for tensor in kept if not isinstance(tensor, PackedWeight))
    for one, other in zip(*outs, strict=True):
        assert torch.equal(one, other)


def test_a_model_that_writes_into_it_is_refused(weight: PackedWeight) -> None:
    with pytest.raises(ModelError, match=r"writes into the weights of its experts.*--precision bf16"):
        weight[1].mul_(2.0)
    assert torch.equal(torch.ones(80).add_(weight[1, 2]), 1 + weight.decoded()[1, 2])


def test_only_the_values_that_are_used_are_decoded(monkeypatch: pytest.MonkeyPatch, weight: PackedWeight) -> None:
    decoded: list[int] = []
    own = bnb.functional.dequantize_4bit

    def counted(packed: torch.Tensor, state: Any) -> torch.Tensor:
        decoded.append(int(state.shape.numel()))
        found: torch.Tensor = own(packed, state)
        return found

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", counted)
    one = weight[3].t()
    assert decoded == []
    assert "nf4" in repr(one)
    torch.ones(2, 80) @ one
    assert decoded == [96 * 80 + 3 * 96 * 80 % (64 * 256)]  # from the group of scales in which the expert begins
    assert torch.ones(2, 96) @ weight[:, :, :0][1] is not None
    assert len(decoded) == 1
