"""CPU tensors over time: what was held, by category and line."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pytest_vram.probe.host import HostProbe


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)) for _ in range(3)
        )
        self.lm_head = nn.Linear(256, 500)

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = x + layer(x)
        return nn.functional.cross_entropy(self.lm_head(x), torch.zeros(len(x), dtype=torch.long))


def step(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(128, 256)).backward()
    optimizer.step()
    return optimizer


def size(tensors: Any) -> int:
    return sum(-(-t.untyped_storage().nbytes() // 512) * 512 for t in tensors)


def recorded(probe: HostProbe, model: nn.Module, *, timeline: bool = True) -> tuple[Any, Any, Any]:
    probe.reset_peak()
    probe.begin_test(record=True, timeline=timeline)
    try:
        kept = step(model)
        return probe.timeline(0), probe.holders(0, 1000), kept
    finally:
        probe.end_test()


def test_a_step_on_the_cpu_has_a_curve_and_categories() -> None:
    probe = HostProbe()
    probe.begin_test(record=False)
    model = Model()
    probe.end_test()
    timeline, holders, optimizer = recorded(probe, model)
    assert timeline.peak_bytes == probe.peak()[0].allocated_bytes
    assert sum(holder.size_bytes for holder in holders) == timeline.peak_bytes
    last = {series.name: series.sizes[-1] for series in timeline.categories}
    assert last["weights"] == size(model.parameters())
    assert last["gradients"] == size(p.grad for p in model.parameters())
    assert last["optimizer"] == size(t for state in optimizer.state.values() for t in state.values())
    assert last["activations"] == 0
    assert max(next(s.sizes for s in timeline.categories if s.name == "activations")) > 128 * 1024 * 4 * 3
    assert (timeline.reserved, timeline.layout) == ((), None)
    assert {holder.module for holder in holders} >= {"layers.*.*", "lm_head"}
    assert any(holder.location == "held before the test" for holder in holders)
    assert any("test_host.py" in holder.location for holder in holders)


def test_a_budget_alone_has_a_curve_and_lines() -> None:
    probe = HostProbe()
    timeline, holders, _ = recorded(probe, Model(), timeline=False)
    assert timeline.peak_bytes == probe.peak()[0].allocated_bytes
    assert timeline.categories == ()
    assert {holder.category for holder in holders} == {None}


def test_what_a_test_leaves_is_named_by_line() -> None:
    probe = HostProbe()
    probe.begin_test(record=True)
    kept = torch.ones(1000)
    torch.ones(5000)
    (holder,) = probe.left(0, 5)
    probe.end_test()
    assert holder.size_bytes == size([kept])
    assert "in test_what_a_test_leaves" in holder.location
    assert probe.timeline(0) is None
