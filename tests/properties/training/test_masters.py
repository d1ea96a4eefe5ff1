"""A bf16 adapter is updated in fp32: no step is rounded away, and the bits that bf16 drops are kept and resumed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_rows, padded, relative_l2, save_tiny
from torch import Tensor

from finetune.config.settings import AdapterConfig, ModelConfig, TrainConfig
from finetune.model.load import attach_adapter, load_base
from finetune.training.masters import DROPPED, joined, split
from finetune.training.optim import (
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    optimizer_step,
    rounded_away,
    state_bytes,
)
from finetune.training.step import train_step

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft 0.21
KINDS = ("paged-adamw", "paged-adamw-8bit", "adamw-8bit")
FEW = settings(max_examples=settings.default.max_examples // 5)
FROZEN = torch.nn.Parameter(torch.zeros(1), requires_grad=False)


@given(bits=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20))
@settings(max_examples=settings.default.max_examples * 4)
def test_a_weight_and_what_it_drops_are_the_master_bit_for_bit(bits: list[int]) -> None:
    master = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    master = torch.where(master.isnan(), 0.0, master)
    weight, dropped = parts(master)
    assert torch.equal(joined(weight, dropped).view(torch.int32), master.view(torch.int32))
    nearest = master.to(torch.bfloat16).float()
    assert ((weight.float() - master).abs() <= (nearest - master).abs()).logical_or(nearest.isinf()).all()


@pytest.mark.parametrize("bits", [0x3F800000 + 0x8000, 0x3F810000 + 0x8000, 0x3F807FFF, 0x7F7FFFFF, -(2**31)])
def test_ties_the_largest_number_and_minus_zero(bits: int) -> None:
    master = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert torch.equal(joined(*parts(master)).view(torch.int32), master.view(torch.int32))


def test_what_is_not_a_number_stays_none() -> None:
    weight, _ = parts(torch.tensor([float("nan")]))
    assert weight.isnan().all()


def parts(master: Tensor) -> tuple[Tensor, Tensor]:
    weight, dropped = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    split(master.clone(), weight, dropped)
    return weight, dropped


def made(name: str, start: Tensor, *frozen: torch.nn.Parameter, **changes: Any) -> tuple[torch.nn.Parameter, Any]:
    parameter = torch.nn.Parameter(start.clone())
    config = TrainConfig(optimizer=name, **changes)  # type: ignore[arg-type]  # fields by name
    return parameter, make_optimizer([parameter, *frozen], config)


def stepped(parameter: torch.nn.Parameter, optimizer: Any, steps: range, *, rate: float) -> None:
    optimizer.param_groups[0]["lr"] = rate
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        gradient = torch.randn(parameter.shape, generator=generator) + 0.5
        parameter.grad = gradient.to(torch.bfloat16).to(parameter.dtype)
        optimizer_step(optimizer)


@pytest.mark.parametrize("name", KINDS)
@given(exponent=st.floats(-7, -2), decay=st.sampled_from([0.0, 0.1]), steps=st.integers(1, 8))
@FEW
def test_a_bf16_weight_follows_the_fp32_one_bit_for_bit(name: str, exponent: float, decay: float, steps: int) -> None:
    start = torch.randn(64, 80, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    weight, optimizer = made(name, start, FROZEN, weight_decay=decay)
    exact, reference = made(name, start.float(), FROZEN, weight_decay=decay)
    for parameter, steps_of in ((weight, optimizer), (exact, reference)):
        stepped(parameter, steps_of, range(steps), rate=10**exponent)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(joined(weight.data, optimizer.state[weight][DROPPED]), exact.data)
    assert (weight - exact).abs().max() <= exact.abs().max() * 2.0**-8
    held = [sum(t.nbytes for t in state.values() if isinstance(t, Tensor)) for state in (*optimizer.state.values(),)]
    plain = [sum(t.nbytes for t in state.values() if isinstance(t, Tensor)) for state in (*reference.state.values(),)]
    assert held[0] - plain[0] == 2 * weight.numel()


@pytest.mark.parametrize("name", KINDS)
def test_a_rate_too_small_for_bf16_still_gets_there(name: str) -> None:
    """200 steps of 1e-5 move 0.1 by 0.002; in bf16 alone, whose numbers there are 0.0005 apart, by nothing."""
    start = torch.full((64, 80), 0.1).to(torch.bfloat16)
    for frozen, moves in (((FROZEN,), True), ((), False)):  # the control: without masters, as with --full
        weight, optimizer = made(name, start, *frozen)
        stepped(weight, optimizer, range(200), rate=1e-5)
        distance = float((weight.detach().float() - start.float()).abs().mean())
        assert distance > 0.0005 if moves else distance == 0.0


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("count", [80, 8192])
def test_a_resumed_bf16_weight_is_the_straight_runs(name: str, count: int) -> None:
    start = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    straight, optimizer = made(name, start, FROZEN)
    stepped(straight, optimizer, range(6), rate=1e-5)
    first, early = made(name, start, FROZEN)
    stepped(first, early, range(3), rate=1e-5)
    resumed, late = made(name, first.data, FROZEN)
    load_optimizer_state(late, optimizer_state(early))
    stepped(resumed, late, range(3, 6), rate=1e-5)
    assert torch.equal(resumed, straight)
    assert torch.equal(late.state[resumed][DROPPED], optimizer.state[straight][DROPPED])
    forgetful, without = made(name, first.data, FROZEN)  # the control: the dropped bits matter
    state = optimizer_state(early)
    del state[0][DROPPED]
    load_optimizer_state(without, state)
    stepped(forgetful, without, range(3, 6), rate=1e-5)
    assert relative_l2([without.state[forgetful][DROPPED].float()], [late.state[resumed][DROPPED].float()]) > 1e-2


def test_other_dtypes_have_no_master() -> None:
    for dtype in (torch.float32, torch.float16):
        weight, optimizer = made("paged-adamw", torch.ones(8, dtype=dtype), FROZEN)
        stepped(weight, optimizer, range(1), rate=1e-3)
        assert DROPPED not in optimizer.state[weight]


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masters", [False, True])
def test_what_the_states_will_take_is_what_they_take(name: str, dtype: torch.dtype, masters: bool) -> None:
    weight, optimizer = made(name, torch.ones(96, 128, dtype=dtype), *([FROZEN] * masters))
    told = state_bytes([weight], TrainConfig(optimizer=name), masters=masters)  # type: ignore[arg-type]  # one of the Literal's values
    stepped(weight, optimizer, range(1), rate=1e-3)
    large = {key: t.nbytes for key, t in optimizer.state[weight].items() if isinstance(t, Tensor) and t.dim() == 2}
    assert told == sum(large.values()) > 0
    assert state_bytes([weight], TrainConfig(optimizer="paged-adamw"), masters=masters) == 0


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_paged_run_is_the_unpaged_one_in_gradients_states_and_bytes(compute: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)

    def run(name: str) -> tuple[list[float], list[Tensor], dict[str, Tensor]]:
        base = load_base(ModelConfig(model=str(folder), compute_dtype=compute, device="cpu"))  # type: ignore[arg-type]  # one of the Literal's values
        model = attach_adapter(base, AdapterConfig(rank=64), seed=0)
        config = TrainConfig(optimizer=name, max_steps=3)  # type: ignore[arg-type]  # one of the Literal's values
        optimizer = make_optimizer(model.parameters(), config)
        window = [padded(make_rows([12, 7], seed=1)), padded(make_rows([9, 15], seed=2))]
        norms = [train_step(model, window, optimizer, config, step=s, total_steps=3).grad_norm for s in range(3)]
        states = {
            f"{index}.{key}": value
            for index, state in optimizer_state(optimizer).items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
        return norms, [p.detach() for p in model.parameters() if p.requires_grad], states

    paged, plain, other = run("paged-adamw-8bit"), run("adamw-8bit"), run("paged-adamw")
    assert paged[0] == plain[0]
    assert all(torch.equal(a, b) for a, b in zip(paged[1], plain[1], strict=True))
    assert paged[2].keys() == plain[2].keys()
    assert all(torch.equal(value, plain[2][key]) for key, value in paged[2].items())
    assert any(value.dtype == torch.uint8 for value in paged[2].values())
    assert sum(v.nbytes for v in paged[2].values()) == sum(v.nbytes for v in plain[2].values())
    assert not all(torch.equal(a, b) for a, b in zip(paged[1], other[1], strict=True))  # the control


@pytest.mark.parametrize("name", ["adamw", *KINDS])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_who_rounds_updates_away_is_told_and_nobody_else(name: str, full: bool, dtype: torch.dtype) -> None:
    """Held against what becomes of a weight just above the size that the message names, and of one well below."""
    rate = 1e-4
    config = TrainConfig(optimizer=name, learning_rate=rate)  # type: ignore[arg-type]  # one of the Literal's values
    frozen = () if full else (FROZEN,)
    start = torch.tensor([1.01 * 512 * rate, 0.2 * 512 * rate]).repeat(64 * 40).to(dtype)
    weight, optimizer = made(name, start, *frozen)
    told = rounded_away([weight, *frozen], config)
    stepped(weight, optimizer, range(20), rate=rate)
    large, small = ((weight.detach() - start) != 0).view(-1, 2).any(0).tolist()
    assert small
    assert large == (told is None)
    assert told is None or ("0.051" in told and ("--precision fp32" in told) == full)
