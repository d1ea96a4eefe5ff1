# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Computes the cross-entropy of a chunk of logits, and its gradient in their place, in one launch.

PyTorch's operators take some fifteen launches for a chunk, on a copy of the logits in fp32 that each of them reads and
writes. The kernel reads the logits twice, writes the gradient once, and needs no copy: of a chunk it takes a third of
the memory. It computes in fp32 too, so that its results are those of :mod:`finetune.model.loss` up to rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from finetune.model.loss import LogitRule

_BLOCK = 8192
"""Logits of a row that a program holds at a time."""


@triton.jit
def _read(
    at,
    here,
    scale,
    softcap,
    bf16: tl.constexpr,
    scales: tl.constexpr,
    caps: tl.constexpr,
):
    """Return logits in fp32, changed as the rule says."""
    if bf16:  # the bits are converted: a card without bf16 arithmetic can do that too
        bits = tl.load(at.to(tl.pointer_type(tl.int16)), mask=here, other=0).to(tl.int32) << 16
        value = bits.to(tl.float32, bitcast=True)
    else:
        value = tl.load(at, mask=here, other=0.0).to(tl.float32)
    if scales:
        value = value * scale
    if caps:  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        value = (1.0 - 2.0 / (tl.exp(value * (2.0 / softcap)) + 1.0)) * softcap
    return value


@triton.jit
def _larger(one, other):
    return tl.maximum(one, other)


@triton.jit
def _added(one, other):
    return one + other


@triton.jit
def _cross_entropy(
    logits,  # [n, columns], overwritten with the gradient if one is wanted
    targets,  # int64 [n]
    losses,  # fp32 [n]
    columns,
    words,  # the columns of the vocabulary; the columns after it have no probability
    unit,  # fp32 from here on
    scale,
    softcap,
    bf16: tl.constexpr,
    scales: tl.constexpr,
    caps: tl.constexpr,
    wants_gradient: tl.constexpr,
    block_size: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * columns
    target = tl.load(targets + row)
    at_target = _read(first + target, True, scale, softcap, bf16, scales, caps)
    largest, total = -3.4e38, 0.0
    for begin in range(0, words, block_size):
        column = begin + tl.arange(0, block_size)
        here = column < words
        value = _read(first + column, here, scale, softcap, bf16, scales, caps)
        value = tl.where(here, value, float("-inf"))
        higher = tl.maximum(largest, tl.reduce(value, 0, _larger))
        total = total * tl.exp(largest - higher) + tl.reduce(tl.exp(value - higher), 0, _added)
        largest = higher
    tl.store(losses + row, (tl.log(total) + largest - at_target) * unit)
    if wants_gradient:
        tl.debug_barrier()  # the logits are overwritten from here on
        for begin in range(0, columns, block_size):
            column = begin + tl.arange(0, block_size)
            here = column < columns
            value = _read(first + column, here, scale, softcap, bf16, scales, caps)
            gradient = tl.exp(value - largest) / total - tl.where(column == target, 1.0, 0.0)
            gradient = gradient * (unit * scale)
            if caps:
                gradient = gradient * (1.0 - (value / softcap) * (value / softcap))
            gradient = tl.where(column < words, gradient, 0.0)
            if bf16:  # rounded here, because Triton's interpreter truncates where a card rounds to nearest
                bits = gradient.to(tl.int32, bitcast=True)
                nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
                nearest = tl.where(gradient == gradient, nearest, 0x7FC0)
                tl.store(first.to(tl.pointer_type(tl.int16)) + column, nearest.to(tl.int16), mask=here)
            else:
                tl.store(first + column, gradient.to(logits.dtype.element_ty), mask=here)


def losses_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, unit: float, rule: LogitRule, *, wants_gradient: bool
) -> torch.Tensor:
    """Return the loss of each row, and overwrite the logits with the gradient of their sum.

    Args:
        logits: [n, columns] the head's output, contiguous: fp32, bf16 or fp16, on the card.
        targets: [n] int64 token ids.
        unit: the weight of a token.
        rule: how the model changes its logits.
        wants_gradient: whether to compute the gradient. Without it, the logits stay.

    Returns:
        [n], in fp32.
    """
    count, columns = logits.shape
    losses = logits.new_empty(count, dtype=torch.float32)
    if not count:
        return losses
    launch: Any = _cross_entropy[(count,)]
    launch(
        logits,
        targets,
        losses,
        columns,
        columns if rule.words is None else min(rule.words, columns),
        float(unit),
        float(rule.scale),
        float(rule.softcap or 1.0),
        bf16=logits.dtype == torch.bfloat16,
        scales=rule.scale != 1.0,
        caps=bool(rule.softcap),
        wants_gradient=wants_gradient,
        block_size=_BLOCK,
        num_warps=16,
        enable_fp_fusion=True,  # Triton 3.9 warns where this is left to its default
    )
    return losses
