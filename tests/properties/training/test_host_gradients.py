"""Gradients that wait in host memory are those that ``.grad`` adds up to, bit for bit."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import make_rows, padded, tiny_model
from torch import Tensor, nn

from finetune.config.settings import TrainConfig
from finetune.training import host_gradients
from finetune.training.accumulate import window_gradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def micro_batches(draw: st.DrawFn) -> list[list[Tensor | None]]:
    """Gradients of a few parameters for each micro-batch; an expert that no token went to has none."""
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def gradient(dtype: torch.dtype) -> Tensor | None:
        if draw(st.integers(0, 4)) == 0:
            return None
        scale = 10.0 ** draw(st.integers(-6, 2))
        return (torch.randn(3, 5, generator=generator) * scale).to(dtype)

    return [[gradient(dtype) for dtype in dtypes] for _ in range(draw(st.integers(1, 5)))]


def waited(gradients: list[list[Tensor | None]], put_away: Any = host_gradients.put_away) -> list[Tensor | None]:
    """The window's gradients, each micro-batch's but the last put away."""
    dtypes = [next((g.dtype for g in of if g is not None), torch.float32) for of in zip(*gradients, strict=True)]
    parameters = [nn.Parameter(torch.zeros(3, 5, dtype=dtype)) for dtype in dtypes]
    earlier: dict[nn.Parameter, Tensor] = {}
    for number, of_batch in enumerate(gradients, start=1):
        for parameter, gradient in zip(parameters, of_batch, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        if number < len(gradients):
            put_away(parameters, earlier)
            assert all(parameter.grad is None for parameter in parameters)
    host_gradients.bring_back(earlier)
    assert not earlier
    return [parameter.grad for parameter in parameters]


def summed(gradients: list[list[Tensor | None]]) -> list[Tensor | None]:
    """What autograd makes of them: each added to those before it."""
    columns = [[g for g in of if g is not None] for of in zip(*gradients, strict=True)]
    return [reduce(torch.add, of) if of else None for of in columns]


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return all(
        a is b is None or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


@given(gradients=micro_batches())
def test_what_waited_is_the_sum(gradients: list[list[Tensor | None]]) -> None:
    assert same(waited(gradients), summed(gradients))


def test_a_gradient_that_is_lost_or_added_in_another_order_is_seen() -> None:
    tenths = [torch.full((3, 5), value, dtype=torch.bfloat16) for value in (1.0, 1 / 256, 1 / 256)]
    gradients: list[list[Tensor | None]] = [[of] for of in tenths]

    def forgets(parameters: list[nn.Parameter], earlier: dict[nn.Parameter, Tensor]) -> None:
        earlier.clear()
        host_gradients.put_away(parameters, earlier)

    assert not same(waited(gradients, forgets), summed(gradients))
    assert not same(summed(gradients[::-1]), summed(gradients))


def adapted(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = get_peft_model(
        tiny_model(dtype=dtype), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=max(5, settings.default.max_examples // 10))
@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=5), seed=st.integers(0, 2**16))
def test_a_window_whose_gradients_wait_comes_to_the_same_bits(dtype: torch.dtype, sizes: list[int], seed: int) -> None:
    model = adapted(dtype)
    rows = iter(make_rows([4 + (seed + i) % 9 for i in range(sum(sizes))], seed=seed, supervised=0.5))
    window = [padded([next(rows) for _ in range(size)]) for size in sizes]
    found = []
    for on_host in (False, True):
        model.zero_grad(set_to_none=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host_gradients, "wanted", lambda *_, of=on_host: of)
            stats = window_gradients(model, window, TrainConfig(checkpointing=False))
        found.append((stats, [p.grad for p in model.parameters() if p.requires_grad]))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("device", "adapter", "optimizer", "expected"),
    [
        ("meta", True, "paged-adamw", True),
        ("meta", True, "paged-adamw-8bit", True),
        ("meta", True, "adamw-8bit", False),
        ("meta", False, "paged-adamw", False),
        ("cpu", True, "paged-adamw", False),
    ],
)
def test_only_an_adapters_gradients_wait_under_a_paged_optimizer(
    device: str, adapter: bool, optimizer: Any, expected: bool
) -> None:
    model = adapted(torch.float32) if adapter else tiny_model()
    assert host_gradients.wanted(model.to(device), TrainConfig(optimizer=optimizer)) is expected
