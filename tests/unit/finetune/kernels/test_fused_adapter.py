"""A fused group lets go of what a broken forward pass left, and needs bitsandbytes for 4-bit weights only."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from finetune.kernels import fused_adapter
from finetune.training import split

if TYPE_CHECKING:
    from collections.abc import Iterator

peft = pytest.importorskip("peft")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)


def adapted() -> Any:
    return peft.get_peft_model(Attention(), peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))


@pytest.fixture
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    found = importlib.util.find_spec
    for name in ("bitsandbytes", "bitsandbytes.nn", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    monkeypatch.delitem(sys.modules, "finetune.kernels.fused_adapter")
    yield importlib.import_module("finetune.kernels.fused_adapter")
    sys.modules["finetune.kernels"].fused_adapter = fused_adapter  # type: ignore[attr-defined]  # modules have no declared names


def test_a_base_in_bf16_needs_no_bitsandbytes(without_bitsandbytes: Any) -> None:
    model = Attention()
    layer = adapted().base_model.model.q_proj
    assert without_bitsandbytes._obstacle(layer) is None
    assert without_bitsandbytes._weight(model.q_proj, torch.float32) is model.q_proj.weight


def test_what_a_trial_without_room_left_in_a_group_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    assert fused_adapter.fuse(model).fused == 2
    x = torch.ones(3, 8)
    model.base_model.model.q_proj(x)  # memory runs out before k_proj asks for its output
    group = model.base_model.model.q_proj.finetune_fused
    left = [weakref.ref(tensor) for tensor in (x, *group.waiting.values())]
    assert len(left) == 2
    del x
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    split._tidy(model)
    assert [reference() for reference in left] == [None, None]
    again = torch.ones(3, 8)
    assert torch.equal(model.base_model.model.k_proj(again), group.members[1].plain(again))
