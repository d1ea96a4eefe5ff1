# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Decodes NF4 weights in one launch, double quantization included.

bitsandbytes takes three launches: one decodes the scales from 8 bits to fp32, one adds the mean to them, and one
decodes the weights. A training step decodes each weight three times. On a fast card with short rows, the time of a step
is the time that the host takes for its launches.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_ROWS = 64
_SCALES_BLOCK = 256
"""Number of scales that share a scale of their own. bitsandbytes makes no other size."""


@triton.jit
def _decode(
    packed,  # uint8: two codes in each byte, the first in its upper half
    decoded,
    codes,  # fp32 [16]
    scales,  # of each block of weights: uint8 if the scales are quantized too, else fp32
    scale_codes,  # fp32 [256]
    scale_scales,  # fp32, of each 256 scales
    scale_mean,  # fp32, added to the decoded scales
    size,  # number of weights
    bf16: tl.constexpr,
    nested: tl.constexpr,
    half_block: tl.constexpr,  # bytes of a block
    scales_block: tl.constexpr,
    rows: tl.constexpr,  # blocks of weights that one program decodes
):
    block = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    here = block * 2 * half_block < size
    if nested:
        code = tl.load(scales + block, mask=here, other=0).to(tl.int32)
        scale = tl.load(scale_codes + code) * tl.load(scale_scales + block // scales_block, mask=here, other=0.0)
        scale = scale + tl.load(scale_mean)
    else:
        scale = tl.load(scales + block, mask=here, other=0.0)
    at = block[:, None] * half_block + tl.arange(0, half_block)[None, :]
    pair = tl.load(packed + at, mask=2 * at < size, other=0).to(tl.int32)
    first = tl.load(codes + (pair >> 4)) * scale[:, None]
    second = tl.load(codes + (pair & 15)) * scale[:, None]
    both = tl.reshape(tl.join(first, second), (rows, 2 * half_block))
    to = block[:, None] * 2 * half_block + tl.arange(0, 2 * half_block)[None, :]
    if bf16:  # the bits are rounded here, because Triton's interpreter truncates where a card rounds to nearest
        bits = both.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(decoded.to(tl.pointer_type(tl.int16)) + to, nearest.to(tl.int16), mask=to < size)
    else:
        tl.store(decoded + to, both.to(decoded.dtype.element_ty), mask=to < size)


def can_decode(state: Any) -> bool:
    """Return whether :func:`decode` knows the format of a quantization state: NF4, as bitsandbytes makes it."""
    if state.quant_type != "nf4" or state.blocksize & (state.blocksize - 1):
        return False
    return not state.nested or state.state2.blocksize == _SCALES_BLOCK


def decode(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """Decode a weight [out, in] to ``dtype``. The result equals that of bitsandbytes' own decoder bit for bit.

    Args:
        packed: the packed weight: uint8, contiguous, on the card.
        state: its quantization state, for which :func:`can_decode` returns true.
        dtype: fp32, bf16 or fp16.
    """
    size = state.shape.numel()
    decoded: torch.Tensor = packed.new_empty(tuple(state.shape), dtype=dtype)
    inner = state.state2 if state.nested else None
    _decode[(-(-size // (_ROWS * state.blocksize)),)](
        packed,
        decoded,
        state.code,
        state.absmax,
        state.code if inner is None else inner.code,
        state.absmax if inner is None else inner.absmax,
        state.absmax if inner is None else state.offset,
        size,
        bf16=dtype == torch.bfloat16,
        nested=inner is not None,
        half_block=state.blocksize // 2,
        scales_block=_SCALES_BLOCK,
        rows=_ROWS,
        num_warps=4,
        enable_fp_fusion=False,  # the product must be rounded before the mean is added
    )
    return decoded
