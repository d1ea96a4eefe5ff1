"""Patches of bitsandbytes: 8-bit layers that keep no input, 4-bit layers whose scales can be gathered, and more.

Each docstring says when its patch may go; ``table.py`` has all of them with the version at which to look again.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

SCALE = 127
"""The int8 number that stands for a row's largest weight (https://arxiv.org/abs/2208.07339, equation 3)."""
SCALES, SCALES_OF_SCALES = "_scales", "_scales_of_scales"
"""Names of the parameters that hold a sharded layer's scales."""


def keep_no_inputs(model: nn.Module) -> None:
    """Replace the class of the model's 8-bit layers, so that they keep nothing for backward. All of them are frozen.

    bitsandbytes keeps each layer's input for the gradient of the weight, which a frozen weight does not need. It
    attaches the input to the graph directly, where checkpointing cannot drop it: the inputs of all layers stay until
    backward, as if there were no checkpointing. The patch may go when ``MatMul8bitLt`` uses ``save_for_backward``, or
    keeps no input for a frozen weight; look again with 0.52.
    """
    for module in model.modules():
        if type(module) is bnb.nn.Linear8bitLt:
            module.__class__ = FrozenLinear8bit


class FrozenLinear8bit(bnb.nn.Linear8bitLt):  # type: ignore[misc]  # bitsandbytes has no annotations
    """An 8-bit layer with bitsandbytes' outputs and input gradients, and no gradients of the weight and the bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply ``x`` [..., in] by the weight, and return [..., out]."""
        if x.requires_grad and torch.is_grad_enabled():
            product: torch.Tensor = _Product.apply(x, self)
            return product
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the output with bitsandbytes' own forward pass."""
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


def keep_weights_unpacked(model: Any) -> None:
    """Keep bitsandbytes from repacking the weights in evaluation mode, which it does on CPUs with AVX512_BF16.

    Repacking rounds the weights' scales to bf16, and unpacking does not bring the lost bits back. After an evaluation
    the run would train on another base than before. The patch may go when packing and unpacking a layer restores its
    scales bit for bit; look again with 0.52.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def rows_by_themselves(model: nn.Module) -> Iterator[None]:
    """Make 8-bit layers compute each row independently of the other rows, inside the ``with`` block.

    LLM.int8() multiplies a whole column in 16 bits, for all rows, when one row has a large value in it. A threshold of
    0 turns that off. The patch may go when bitsandbytes can change the threshold of a layer that exists; look again
    with 0.52.
    """
    states: list[Any] = [module.state for module in model.modules() if hasattr(module, "init_8bit_state")]
    thresholds = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold


def silence_casts() -> None:
    """Silence the warning that LLM.int8() computes in fp16, which appears at every layer of every step.

    The patch may go when bitsandbytes gives the warning once or not at all; look again with 0.52.
    """
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What is left of a quantization state without its scales."""

    shape: torch.Size
    code: torch.Tensor
    blocksize: int
    quant_type: str
    dtype: torch.dtype
    offset: torch.Tensor | None
    code_of_scales: torch.Tensor | None
    blocksize_of_scales: int

    @classmethod
    def of(cls, state: QuantState) -> Frame:
        """Take the frame of a state."""
        nested = state.state2
        return cls(
            shape=state.shape,
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
            offset=state.offset,
            code_of_scales=None if nested is None else nested.code,
            blocksize_of_scales=0 if nested is None else nested.blocksize,
        )

    def filled(self, scales: torch.Tensor, scales_of_scales: torch.Tensor | None) -> QuantState:
        """Return a state with these scales: those of a gathered layer, or of a part of a weight."""
        nested = None
        if scales_of_scales is not None:
            nested = QuantState(
                absmax=scales_of_scales,
                code=self.code_of_scales,
                blocksize=self.blocksize_of_scales,
                dtype=torch.float32,
            )
        return QuantState(
            absmax=scales,
            shape=self.shape,
            code=self.code,
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=self.dtype,
            offset=self.offset,
            state2=nested,
        )


class GatheredLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc]  # bitsandbytes has no annotations
    """A frozen 4-bit layer whose scales are parameters of their own, so that they are gathered as its weight is."""

    frame: Frame

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply ``x`` [..., in] by the weight; returns [..., out]."""
        state = self.frame.filled(getattr(self, SCALES), getattr(self, SCALES_OF_SCALES, None))
        given = x.dtype
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out: torch.Tensor = bnb.matmul_4bit(x, self.weight, bias=bias, quant_state=state).to(given)
        return out


def gather_scales(layer: Any) -> None:
    """Let a 4-bit layer read its scales from its parameters :data:`SCALES` and :data:`SCALES_OF_SCALES`.

    bitsandbytes keeps the scales beside the weight, where FSDP does not shard them: 1/8 of a 4-bit weight's bytes (with
    double quantization 1/32) would stay whole in every rank. The patch may go when ``Linear4bit`` registers its scales
    as parameters or buffers that FSDP shards; look again with 0.52.
    """
    layer.frame = Frame.of(layer.weight.quant_state)
    layer.quant_state = None
    layer.__class__ = GatheredLinear4bit
