"""A training step that you test already, with a budget on top: one line."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def make_model(width: int = 1024, depth: int = 8) -> nn.Module:
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU())))


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> torch.Tensor:
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@pytest.mark.vram(max_mb=350)
@pytest.mark.parametrize("rows", [256, 2048])
def test_training_step(gpu, rows):
    model = make_model().to(gpu.device)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        loss = training_step(model, optimizer, torch.randn(rows, 1024, device=gpu.device))
    assert loss.shape == ()
