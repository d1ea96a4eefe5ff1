"""Each optimizer of the command line against Adam's formulas in fp64: bias correction, decoupled decay, both moments.

Source of the formulas: https://arxiv.org/abs/1711.05101 (AdamW), algorithm 2. 8-bit states: https://arxiv.org/abs/2110.02861.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.blockwise import dequantize_blockwise
from torch import Tensor

from finetune.config.settings import OptimizerName, TrainConfig
from finetune.training.optim import make_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable

OPTIMIZERS = get_args(OptimizerName)
EIGHT_BIT = tuple(name for name in OPTIMIZERS if name.endswith("8bit"))
COUNT = 8192  # bitsandbytes keeps smaller tensors' states in 32 bits
MAP_ERROR = {True: 0.00703125 + 2.0**-15, False: 0.003515625 + 2.0**-15}  # half a cell, and the CPU's grid
FEW = settings(max_examples=settings.default.max_examples // 5)


@dataclass(kw_only=True)
class Reference:
    """AdamW in fp64, written out."""

    parameter: Tensor
    first: Tensor
    second: Tensor
    summands: Tensor
    """The first moment of the gradients' magnitudes: what a sum that cancels is rounded to."""
    steps: int = 0

    def step(self, gradient: Tensor, *, lr: float, decay: float, betas: tuple[float, float], eps: float) -> None:
        self.steps += 1
        g = gradient.double()
        self.first = betas[0] * self.first + (1 - betas[0]) * g
        self.second = betas[1] * self.second + (1 - betas[1]) * g * g
        self.summands = betas[0] * self.summands + (1 - betas[0]) * g.abs()
        corrected_first = self.first / (1 - betas[0] ** self.steps)
        corrected_second = self.second / (1 - betas[1] ** self.steps)
        self.parameter = self.parameter * (1 - lr * decay) - lr * corrected_first / (corrected_second.sqrt() + eps)


def start(count: int, seed: int) -> tuple[torch.nn.Parameter, Reference]:
    torch.manual_seed(seed)
    parameter = torch.nn.Parameter(torch.randn(count))
    zeros = torch.zeros(count, dtype=torch.float64)
    reference = Reference(parameter=parameter.detach().double(), first=zeros, second=zeros, summands=zeros)
    return parameter, reference


def build(name: str, parameter: torch.nn.Parameter, **changes: Any) -> torch.optim.Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Paged optimizers are not supported on CPU"
        return make_optimizer([parameter], TrainConfig(optimizer=name, **changes))  # type: ignore[arg-type]  # fields by name


def take_step(optimizer: torch.optim.Optimizer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()


def hyper(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    (group,) = optimizer.param_groups
    return {"betas": group["betas"], "eps": group["eps"], "decay": group["weight_decay"]}


def gradient(count: int, seed: int, exponent: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) * 10**exponent
    return values * (torch.rand(count, generator=generator) < 0.9)  # some are exactly zero


RATES = st.floats(1e-6, 1e-1)
GRADIENTS = st.lists(st.tuples(st.integers(0, 1000), st.floats(-6, 2), RATES), min_size=1, max_size=7)


def moments(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> tuple[Tensor, Tensor]:
    """Both moments in fp32, decoded if they are held in 8 bits."""
    state = optimizer.state[parameter]
    if "exp_avg" in state:
        return state["exp_avg"], state["exp_avg_sq"]
    if state["state1"].dtype == torch.float32:
        return state["state1"], state["state2"]
    return (
        dequantize_blockwise(state["state1"], state["absmax1"]),
        dequantize_blockwise(state["state2"], state["absmax2"], signed=False),
    )


def held_to_32_bits(parameter: Tensor, states: tuple[Tensor, Tensor], reference: Reference, travelled: float) -> None:
    scale = float(reference.parameter.abs().max()) + travelled
    assert float((parameter.detach().double() - reference.parameter).abs().max()) <= 2e-6 * scale
    first, second = states
    rounding = 3 * 2.0**-24 * reference.steps  # a product, another, and their sum
    assert ((first.double() - reference.first).abs() <= rounding * reference.summands + 2.0**-149).all()
    assert ((second.double() - reference.second).abs() <= 2 * rounding * reference.second + 2.0**-149).all()


def held_to_8_bits(parameter: Tensor, states: tuple[Tensor, Tensor], reference: Reference, travelled: float) -> None:
    scale = float(reference.parameter.abs().max()) + travelled * 10
    assert float((parameter.detach().double() - reference.parameter).abs().max()) <= 1e-5 * scale
    assert 0 <= max(shares_of_the_map_error(states, reference)) <= 1


def shares_of_the_map_error(states: tuple[Tensor, Tensor], reference: Reference) -> list[float]:
    """How far each moment is from the reference's, as a share of the map's bound: the worst element."""
    shares = []
    for signed, held, exact in zip((True, False), states, (reference.first, reference.second), strict=True):
        largest = torch.stack([block.abs().max() for block in exact.split(256)]).repeat_interleave(256)
        bound = MAP_ERROR[signed] * largest * (1 + 1e-6) + 1e-30
        shares.append(float(((held.double() - exact).abs() / bound).max()))
    return shares


def held_to_the_formulas(
    name: str,
    gradients: list[tuple[int, float, float]],
    *,
    decay: float,
    count: int,
    formulas: Callable[..., None] = Reference.step,
) -> None:
    """Each step's parameter and moments; 8-bit states are rounded in each step, and the next begins from them."""
    parameter, reference = start(count, seed=count)
    optimizer = build(name, parameter, weight_decay=decay)
    travelled = 0.0
    for seed, exponent, lr in gradients:
        if name in EIGHT_BIT:
            if reference.steps:
                reference.first, reference.second = (held.double() for held in moments(optimizer, parameter))
            reference.parameter, travelled = parameter.detach().double(), 0.0
        parameter.grad = gradient(count, seed, exponent)
        optimizer.param_groups[0]["lr"] = lr
        take_step(optimizer)
        formulas(reference, parameter.grad, lr=lr, **hyper(optimizer))
        travelled += lr
        held_to = held_to_8_bits if name in EIGHT_BIT else held_to_32_bits
        held_to(parameter, moments(optimizer, parameter), reference, travelled)
    assert (optimizer.state[parameter].get("state1", parameter).dtype == torch.uint8) == (name in EIGHT_BIT)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in EIGHT_BIT])
@given(gradients=GRADIENTS, decay=st.sampled_from([0.0, 0.01, 0.5]), count=st.integers(1, 300))
@FEW
def test_32_bit_steps_follow_the_formulas(
    name: str, gradients: list[tuple[int, float, float]], decay: float, count: int
) -> None:
    held_to_the_formulas(name, gradients, decay=decay, count=count)


@pytest.mark.parametrize("name", EIGHT_BIT)
@given(gradients=GRADIENTS, decay=st.sampled_from([0.0, 0.1]))
@FEW
def test_8_bit_steps_follow_the_formulas_from_the_states_they_hold(
    name: str, gradients: list[tuple[int, float, float]], decay: float
) -> None:
    held_to_the_formulas(name, gradients, decay=decay, count=COUNT)


def test_8_bit_states_come_within_a_tenth_of_their_bound() -> None:
    parameter, reference = start(COUNT, seed=0)
    optimizer = build("adamw-8bit", parameter)
    parameter.grad = torch.linspace(-1, 1, COUNT)[torch.randperm(COUNT)]
    take_step(optimizer)
    reference.step(parameter.grad, lr=1e-4, **hyper(optimizer))
    assert all(0.9 < share <= 1 for share in shares_of_the_map_error(moments(optimizer, parameter), reference))


def no_bias_correction(reference: Reference, gradient: Tensor, **rest: Any) -> None:
    taken, reference.steps = reference.steps, 10_000
    reference.step(gradient, **rest)
    reference.steps = taken + 1


def decay_through_the_gradient(reference: Reference, gradient: Tensor, *, decay: float, **rest: Any) -> None:
    reference.step(gradient + decay * reference.parameter.float(), decay=0.0, **rest)


def no_memory_of_gradients(reference: Reference, gradient: Tensor, **rest: Any) -> None:
    reference.first = torch.zeros_like(reference.first)
    reference.step(gradient, **rest)


def no_memory_of_squares(reference: Reference, gradient: Tensor, **rest: Any) -> None:
    reference.second = torch.zeros_like(reference.second)
    reference.step(gradient, **rest)


def a_larger_epsilon(reference: Reference, gradient: Tensor, *, eps: float, **rest: Any) -> None:
    reference.step(gradient, eps=100 * eps, **rest)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "mistaken",
    [
        no_bias_correction,
        decay_through_the_gradient,
        no_memory_of_gradients,
        no_memory_of_squares,
        a_larger_epsilon,
    ],
)
def test_the_check_rejects_a_mistaken_formula(name: str, mistaken: Callable[..., None]) -> None:
    gradients = [(seed, -3.0, 1e-2) for seed in range(5)]
    held_to_the_formulas(name, gradients, decay=0.1, count=COUNT)
    with pytest.raises(AssertionError):
        held_to_the_formulas(name, gradients, decay=0.1, count=COUNT, formulas=mistaken)


def held_to_be_one(name: str, plain: Any, gradients: list[tuple[int, float, float]]) -> None:
    """Both optimizers' parameters and states, bit for bit, and the bytes that they hold."""
    parameters, optimizers = [], []
    for make in (lambda p: build(name, p), plain):
        parameter, _ = start(COUNT, seed=3)
        parameters.append(parameter)
        optimizers.append(make(parameter))
    for seed, exponent, lr in gradients:
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            parameter.grad = gradient(COUNT, seed, exponent)
            optimizer.param_groups[0]["lr"] = lr
            take_step(optimizer)
    assert torch.equal(*parameters)
    states = [optimizer.state[parameter] for optimizer, parameter in zip(optimizers, parameters, strict=True)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key])), key
    held = [sum(t.nbytes for t in state.values() if isinstance(t, Tensor)) for state in states]
    assert held[0] == held[1]


@pytest.mark.parametrize(
    ("paged", "plain"),
    [
        ("paged-adamw", lambda p: bitsandbytes.optim.AdamW([p], optim_bits=32, weight_decay=0.0)),
        ("paged-adamw-8bit", lambda p: build("adamw-8bit", p)),
    ],
)
@given(gradients=GRADIENTS)
@FEW
def test_paged_is_unpaged_bit_for_bit(paged: str, plain: Any, gradients: list[tuple[int, float, float]]) -> None:
    held_to_be_one(paged, plain, gradients)


@pytest.mark.parametrize(
    "other",
    [
        lambda p: build("adamw-8bit", p),
        lambda p: build("paged-adamw", p, weight_decay=0.01),
        lambda p: bitsandbytes.optim.AdamW([p], optim_bits=32, weight_decay=0.0, eps=1.1e-8),
    ],
    ids=["in 8 bits", "with decay", "another epsilon"],
)
def test_the_check_rejects_another_optimizer(other: Any) -> None:
    with pytest.raises(AssertionError):
        held_to_be_one("paged-adamw", other, [(seed, -3.0, 1e-2) for seed in range(3)])


def test_a_step_without_a_gradient_changes_nothing() -> None:
    for name in OPTIMIZERS:
        parameter, _ = start(COUNT, seed=0)
        before = parameter.detach().clone()
        take_step(build(name, parameter, weight_decay=0.5))
        assert torch.equal(parameter, before), name
        assert math.isfinite(float(before.sum()))
