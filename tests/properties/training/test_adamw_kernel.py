"""One launch over many parameters comes to the bits of the readable form, in every state and for every shape.

The kernel runs under Triton's interpreter here; ``tests/gpu`` has it on a card.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune.config.settings import TrainConfig
from finetune.kernels import available
from finetune.training.adamw import Coefficients, Updated
from finetune.training.masters import DROPPED, split
from finetune.training.optim import make_optimizer, optimizer_step
from finetune.training.paged_adamw import update

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("triton")
pytestmark = [  # numpy, which the interpreter computes with, speaks of what a card does in silence
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
]
FEW = settings(max_examples=max(10, settings.default.max_examples // 4), deadline=None)
KINDS = [(torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False)]
SHAPES = st.lists(
    st.sampled_from([(1,), (3, 5), (16,), (31,), (1024,), (1025,), (2, 2048), (16, 96), (0,)]), min_size=1, max_size=6
)


@pytest.fixture(scope="module", autouse=True)
def _interpreted() -> Iterator[None]:
    """Triton decides when a kernel is defined whether it will be interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delitem(sys.modules, "finetune.training.adamw_kernel", raising=False)
        available.kernel_runs_on.cache_clear()
        importlib.import_module("finetune.training.adamw_kernel")
        yield
    sys.modules.pop("finetune.training.adamw_kernel", None)
    available.kernel_runs_on.cache_clear()


def drawn(shape: tuple[int, ...], dtype: torch.dtype, masters: bool, generator: torch.Generator, scale: int) -> Updated:
    master = torch.randn(shape, generator=generator) * 10.0**scale
    weight, dropped = master.to(dtype), None
    if masters:
        weight, dropped = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=torch.int16)
        split(master.clone(), weight, dropped)
    gradient = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.9)
    return Updated(
        weight=weight,
        gradient=gradient.to(dtype),
        first=torch.randn(shape, generator=generator) * 0.1,
        second=torch.rand(shape, generator=generator) * 0.1,
        dropped=dropped,
    )


def copied(of: Updated) -> Updated:
    return replace(
        of,
        weight=of.weight.clone(),
        first=of.first.clone(),
        second=of.second.clone(),
        dropped=None if of.dropped is None else of.dropped.clone(),
    )


def bits(of: Updated) -> list[Tensor]:
    wide = [of.first.view(torch.int32), of.second.view(torch.int32)]
    narrow = torch.int32 if of.weight.dtype == torch.float32 else torch.int16
    return [of.weight.view(narrow), *wide, *([] if of.dropped is None else [of.dropped])]


def same(one: list[Updated], other: list[Updated]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) for x, y in pairs for a, b in zip(bits(x), bits(y), strict=True))


@given(
    shapes=SHAPES,
    kinds=st.lists(st.sampled_from(KINDS), min_size=6, max_size=6),
    seed=st.integers(0, 2**16),
    scale=st.integers(-6, 3),
    rate=st.floats(1e-7, 1e-1),
    decay=st.sampled_from([0.0, 0.1]),
    steps=st.integers(1, 3),
)
@FEW
def test_the_kernel_comes_to_the_bits_of_the_readable_form(
    shapes: list[tuple[int, ...]],
    kinds: list[tuple[torch.dtype, bool]],
    seed: int,
    scale: int,
    rate: float,
    decay: float,
    steps: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    read = [drawn(shape, *kind, generator, scale) for shape, kind in zip(shapes, kinds, strict=False)]
    launched, before = [copied(of) for of in read], [copied(of) for of in read]
    for step in range(1, steps + 1):
        numbers = Coefficients.of(lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay, step=step)
        update(read, numbers, kernel=False)
        update(launched, numbers, kernel=True)
    assert same(read, launched)
    if any(of.first.numel() for of in read):
        assert not same(before, launched)  # the control: something happened


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e-42, -0.0])
def test_what_no_rounding_may_touch(value: float) -> None:
    for dtype, masters in KINDS:
        of = drawn((40,), dtype, masters, torch.Generator().manual_seed(1), 0)
        of.weight.copy_(torch.full((40,), value))
        other = copied(of)
        numbers = Coefficients.of(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, step=1)
        update([of], numbers, kernel=False)
        update([other], numbers, kernel=True)
        assert torch.equal(of.weight.isnan(), other.weight.isnan())
        assert torch.equal(of.weight.nan_to_num(7.0), other.weight.nan_to_num(7.0))


def test_ties_are_rounded_as_the_masters_are() -> None:
    """A gradient of zero and no moments: the master stays, whatever its lower half is."""
    low = torch.tensor([0, 1, 2**15 - 1, 2**15, 2**15 + 1, 2**16 - 1])
    master = ((torch.arange(0x3F80, 0x3F90)[:, None] << 16) + low).flatten().to(torch.int32).view(torch.float32)
    weight, dropped = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    split(master.clone(), weight, dropped)
    zeros = torch.zeros_like(master)
    of = Updated(weight=weight, gradient=torch.zeros_like(weight), first=zeros, second=zeros.clone(), dropped=dropped)
    kept = copied(of)
    numbers = Coefficients.of(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, step=1)
    update([of], numbers, kernel=True)
    assert same([of], [kept])


def test_a_run_with_the_kernel_is_the_run_without_it() -> None:
    frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    results = []
    for kernels in ("auto", "torch"):
        generator = torch.Generator().manual_seed(3)
        parameters = [
            torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for shape in ((16, 65), (7,), (64, 64))
            for dtype in (torch.bfloat16, torch.float32)
        ]
        config = TrainConfig(optimizer="paged-adamw", kernels=kernels, weight_decay=0.1)  # type: ignore[arg-type]  # one of the Literal's values
        optimizer = make_optimizer([*parameters, frozen], config)
        for step in range(3):
            for number, parameter in enumerate(parameters):
                if (number + step) % 4:  # an expert that no token went to has no gradient, and its own count of steps
                    parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                else:
                    parameter.grad = None
            optimizer_step(optimizer)
        states = [optimizer.state[p] for p in parameters]
        tensors = [state[key] for state in states for key in ("state1", "state2", DROPPED) if key in state]
        results.append(([p.data for p in parameters], tensors, [state["step"] for state in states]))
    assert results[0][2] == results[1][2]
    assert len(set(results[0][2])) > 1
    for one, other in zip(results[0][:2], results[1][:2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_the_settings_of_the_optimizer_reach_the_update(kernels: str) -> None:
    parameter = torch.nn.Parameter(torch.linspace(-2, 2, 64))
    exact = torch.nn.Parameter(parameter.detach().double())
    config = TrainConfig(optimizer="paged-adamw", kernels=kernels, weight_decay=0.1)  # type: ignore[arg-type]  # one of the Literal's values
    optimizer = make_optimizer([parameter], config)
    (group,) = optimizer.param_groups
    group["lr"] = 0.05
    named = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
    assert named["weight_decay"] == 0.1
    reference = torch.optim.AdamW([exact], **named, foreach=False)
    for step in range(3):
        parameter.grad = torch.randn(64, generator=torch.Generator().manual_seed(step))
        exact.grad = parameter.grad.double()
        optimizer_step(optimizer)
        reference.step()
    assert float((parameter.detach().double() - exact.detach()).abs().max()) <= 1e-6


def test_who_wraps_bitsandbytes_steps_still_hears_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.optim.optimizer import Optimizer8bit

    heard, own = [], Optimizer8bit.step
    monkeypatch.setattr(Optimizer8bit, "step", lambda self, *args: (heard.append(1), own(self, *args))[1])
    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = make_optimizer([parameter], TrainConfig(optimizer="paged-adamw"))
    parameter.grad = torch.ones(8)
    optimizer.step()
    assert heard == [1]
    assert torch.allclose(parameter, torch.tensor(1 - 2e-4))  # once, and not once by each
    assert optimizer.param_groups[0]["params"] == [parameter]


def test_the_kernel_is_compiled_beforehand_for_what_the_first_step_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many parameters of the same kinds, and without changing a weight or making a state."""
    parameters = [
        torch.nn.Parameter(torch.ones(4, 16, dtype=dtype)) for dtype in (torch.bfloat16,) * 3 + (torch.float32,)
    ]
    frozen = torch.nn.Parameter(torch.ones(4), requires_grad=False)
    optimizer = make_optimizer([*parameters, frozen], TrainConfig())
    kinds: list[list[tuple[object, ...]]] = []

    def noted(those: list[Updated], numbers: Coefficients, *, kernel: bool) -> None:
        assert kernel
        kinds[-1] += [(of.weight.dtype, of.dropped is None, of.weight.numel() % 16, numbers.shrink) for of in those]
        update(those, numbers, kernel=kernel)

    monkeypatch.setattr("finetune.training.paged_adamw.update", noted)
    kinds.append([])
    optimizer.compile_kernel()  # type: ignore[attr-defined]  # PagedAdamW has it
    assert not optimizer.state
    assert all(bool((parameter == 1).all()) for parameter in parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    kinds.append([])
    optimizer_step(optimizer)
    assert sorted(kinds[0], key=str) == sorted(kinds[1], key=str)
    assert len(kinds[0]) == 4


def test_ties_of_weights_without_masters_go_to_the_even_neighbour() -> None:
    """A decay by a quarter takes each odd number of 128ths to the middle between two numbers in bf16."""
    weight = (torch.arange(129, 256, 2) / 128).to(torch.bfloat16)
    of = Updated(
        weight=weight,
        gradient=torch.zeros_like(weight),
        first=torch.zeros(len(weight)),
        second=torch.zeros(len(weight)),
        dropped=None,
    )
    expected = (weight.float() * 0.75).to(torch.bfloat16)
    numbers = Coefficients.of(lr=0.25, betas=(0.9, 0.999), eps=1e-8, weight_decay=1.0, step=1)
    update([of], numbers, kernel=True)
    assert torch.equal(of.weight, expected)


@pytest.mark.parametrize("size", [1, 31, 1025])
def test_nothing_behind_the_end_is_written(size: int) -> None:
    dtype, masters = torch.bfloat16, True
    whole = drawn((size + 16,), dtype, masters, torch.Generator().manual_seed(size), 0)
    before, numbers = copied(whole), Coefficients.of(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, step=1)
    assert whole.dropped is not None
    part = Updated(
        weight=whole.weight[:size],
        gradient=whole.gradient[:size],
        first=whole.first[:size],
        second=whole.second[:size],
        dropped=whole.dropped[:size],
    )
    update([part], numbers, kernel=True)
    assert all(torch.equal(a[size:], b[size:]) for a, b in zip(bits(whole), bits(before), strict=True))
