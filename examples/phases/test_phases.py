"""Where inside a test the memory goes: phases, each with a budget of its own if you like."""

from __future__ import annotations

import torch
from torch import nn


def test_phases(gpu, vram):
    with vram.measure("model"):
        model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(4))).to(gpu.device)
        optimizer = torch.optim.AdamW(model.parameters())
    with vram.measure("forward"):
        loss = model(torch.randn(512, 2048, device=gpu.device)).square().mean()
    with vram.measure("backward", max_gb=0.5):
        loss.backward()
    with vram.measure("optimizer"):
        optimizer.step()

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert vram["forward"].allocated < 2 * vram["model"].allocated
    assert vram["backward"].allocated > 2 * weights  # weights and gradients
    assert vram["optimizer"].allocated > 4 * weights  # weights, gradients, two Adam states
    assert vram.peak.allocated == max(vram[name].allocated for name in ("model", "forward", "backward", "optimizer"))
