# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""NF4 weights decoded in one launch, double quantization included.

bitsandbytes takes three for it: the scales from 8 bits to fp32, the mean added to them, then the weights. A training
step decodes each weight three times, and on a fast card the host's time to launch is what short rows cost.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_ROWS = 64
_SCALES_BLOCK = 256
"""Scales that share a scale of their own, the only size that bitsandbytes makes."""


@triton.jit
def _decode(
    packed,  # uint8: two codes a byte, the first in its upper half
    decoded,
    codes,  # fp32 [16]
    scales,  # of each block of weights: uint8 where they are quantized too, else fp32
    scale_codes,  # fp32 [256]
    scale_scales,  # fp32, of each 256 scales
    scale_mean,  # fp32, added to the decoded scales
    size,  # weights
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
    if bf16:  # by its bits: Triton's interpreter cuts them off, where a card rounds to nearest
        bits = both.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(decoded.to(tl.pointer_type(tl.int16)) + to, nearest.to(tl.int16), mask=to < size)
    else:
        tl.store(decoded + to, both.to(decoded.dtype.element_ty), mask=to < size)


def can_decode(state: Any) -> bool:
    """Whether :func:`decode` knows the format of a weight's quantization state: NF4, as bitsandbytes makes it."""
    if state.quant_type != "nf4" or state.blocksize & (state.blocksize - 1):
        return False
    return not state.nested or state.state2.blocksize == _SCALES_BLOCK


def decode(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] in ``dtype``, to the bits of bitsandbytes' own decoder.

    Args:
        packed: uint8, contiguous, on the card.
        state: its quantization state, of which :func:`can_decode` says yes.
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
        enable_fp_fusion=False,  # the mean is added to a rounded product
    )
    return decoded
