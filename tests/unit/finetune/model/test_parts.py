"""Parts of a weight: which rank keeps which, and what is remembered of the whole."""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from finetune.disk.resume import fingerprint
from finetune.errors import ConfigError
from finetune.model import host_copies, parts


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: size)


def state(scales: int) -> Any:
    return SimpleNamespace(absmax=torch.arange(scales), state2=SimpleNamespace(absmax=torch.arange(1)))


def test_the_parts_of_all_ranks_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, found = torch.arange(10).view(5, 2), []
    for rank in range(4):
        as_rank(monkeypatch, rank, 4)
        found.append(parts.part_of(whole))
    assert [len(part) for part in found] == [2, 2, 1, 0]
    assert torch.equal(torch.cat(found), whole)


def test_parts_that_wait_on_the_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 0, 2)
    weight: Any = nn.Parameter(torch.arange(64, dtype=torch.uint8)[:, None], requires_grad=False)
    weight.quant_state = state(50)
    with parts.kept(on_host=True):
        parts.keep_of_linear(weight)
    kept = (weight, weight.quant_state.absmax, weight.quant_state.state2.absmax)
    assert {part.untyped_storage().data_ptr() for part in kept} == {weight.data_ptr()}
    assert torch.equal(weight.quant_state.absmax, torch.arange(25))
    assert parts.part_of(weight.data).untyped_storage().nbytes() == 16


def test_a_host_without_room_is_told_even_if_loading_says_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 0, 2)
    monkeypatch.setattr(host_copies.host_memory, "available_bytes", lambda: 0)

    def load() -> None:
        for _ in range(2):
            with contextlib.suppress(ConfigError):
                parts.part_of(torch.zeros(4, 1))
        raise RuntimeError("some weights could not be converted")

    with pytest.raises(ConfigError, match="cannot be pinned for a part of the base"), parts.kept(on_host=True):
        load()
    assert not parts.wanted()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_base_in_parts_has_the_fingerprint_of_the_whole(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    as_rank(monkeypatch, rank, 2)
    model: Any = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Module())
    packed = [torch.arange(3000, dtype=torch.uint8)[:, None], torch.arange(300, dtype=torch.uint8).view(3, 100)]
    model[0].weight = nn.Parameter(packed[0].clone(), requires_grad=False)
    model[1].down_proj = nn.Parameter(packed[1].clone(), requires_grad=False)
    expected = fingerprint(model)
    model[0].weight.quant_state = state(50)
    parts.keep_of_linear(model[0].weight)
    model[1].quant_states = {"down_proj": [state(4) for _ in range(3)]}
    own = parts.keep_of_experts(packed[1], model[1].quant_states["down_proj"])
    model[1].down_proj = nn.Parameter(own, requires_grad=False)
    assert (len(model[0].weight), len(own)) == (1500, [2, 1][rank])
    kept = [one.absmax is not None for one in model[1].quant_states["down_proj"]]
    assert kept == [[True, True, False], [False, False, True]][rank]
    assert fingerprint(model) != expected
    assert fingerprint(model, parts.wholes(model)) == expected


def test_weights_are_read_one_after_another_inside_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    for before in (None, "0"):
        if before is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, before)
        with parts.kept():
            assert parts.wanted()
            assert os.environ[name] == "1"
        assert not parts.wanted()
        assert os.environ.get(name) == before
        with parts.kept(wanted=False):
            assert not parts.wanted()
            assert os.environ.get(name) == before


def test_a_model_that_is_not_sharded_needs_no_empty_passes() -> None:
    assert parts.empty_passes(nn.Linear(2, 2), 3) == []


def test_an_empty_pass_has_no_target_and_fills_up_to_the_busiest_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    parts.mark_sharded(model)
    monkeypatch.setattr(dist, "all_reduce", lambda count, op: count.fill_(5))
    found = parts.empty_passes(model, 3)
    assert [(batch.targets, tuple(batch.input_ids.shape)) for batch in found] == [(0, (1, 2))] * 2
