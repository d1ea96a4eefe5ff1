"""LLM.int8() layers that keep no input: what bitsandbytes keeps of it is for the gradient of a weight that is frozen.

Its product hangs the input onto the graph itself, past the hooks that checkpointing drops saved tensors with: every
layer's inputs stay until backward, as if there were no checkpointing.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

SCALE = 127
"""The int8 number that stands for a row's largest weight (https://arxiv.org/abs/2208.07339, equation 3)."""


def keep_no_inputs(model: nn.Module) -> None:
    """Have the model's 8-bit layers, all of them frozen, keep nothing for backward."""
    for module in model.modules():
        if type(module) is bnb.nn.Linear8bitLt:
            module.__class__ = FrozenLinear8bit


class FrozenLinear8bit(bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """The same outputs, and the same gradient of the input; none of the weight or the bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., in] to [..., out]."""
        if x.requires_grad and torch.is_grad_enabled():
            product: torch.Tensor = _Product.apply(x, self)
            return product
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The output by bitsandbytes' own forward pass."""
        out: torch.Tensor = super().forward(x)
        return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: FrozenLinear8bit) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grad_outputs
        state = ctx.layer.state
        weight = state.CB.to(ctx.dtype, copy=True).mul_(state.SCB[:, None] * (1 / SCALE))  # [out, in]
        return grad.to(ctx.dtype) @ weight, None
