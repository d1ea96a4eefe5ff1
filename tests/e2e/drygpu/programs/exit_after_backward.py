"""Ends the moment ``backward()`` returns, with a graph full of Python objects, on two devices."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

layers = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(50)]).cuda()
x = torch.randn(8, 64, device="cuda", requires_grad=True)
checkpoint(layers, x, use_reentrant=True).to("cuda:1").sum().backward()
