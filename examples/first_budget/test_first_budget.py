"""Two tests with a budget: the first fits, the second does not."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.vram(max_gb=1)
def test_fits(gpu):
    weights = torch.empty(128, 1024, 1024, device=gpu.device)  # 128 x 1024 x 1024 fp32 values: 0.5 GiB
    assert weights.numel() == 2**27


@pytest.mark.vram(max_gb=1)
def test_does_not_fit(gpu):
    weights = torch.empty(128, 1024, 1024, device=gpu.device)
    gradients = torch.empty_like(weights)
    states = torch.empty(2, *weights.shape, device=gpu.device)  # Adam keeps two values for each weight
    assert gradients.numel() + states.numel() == 3 * weights.numel()
