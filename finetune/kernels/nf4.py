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

_WORDS = 512
"""Number of words that one program decodes."""
_CODES = 8
"""Number of codes in a word."""
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
    words,  # number of weights / 8
    bf16: tl.constexpr,
    nested: tl.constexpr,
    block_words: tl.constexpr,  # words of a block of weights
    scales_block: tl.constexpr,
    count: tl.constexpr,  # words that one program decodes
):
    # A thread reads 8 codes as a word, and writes 8 weights at once. The codes are looked up in shared memory. Both
    # halve the instructions for a weight, without which they would take longer than the card's memory does.
    word_at = tl.program_id(0).to(tl.int64) * count + tl.arange(0, count)
    here = word_at < words
    block = word_at // block_words
    if nested:
        code = tl.load(scales + block, mask=here, other=0).to(tl.int32)
        scale = tl.load(scale_codes + code) * tl.load(scale_scales + block // scales_block, mask=here, other=0.0)
        scale = scale + tl.load(scale_mean)
    else:
        scale = tl.load(scales + block, mask=here, other=0.0)
    word = tl.load(packed.to(tl.pointer_type(tl.int32)) + word_at, mask=here, other=0)
    place = tl.arange(0, 8)
    code = (word[:, None] >> (4 * (place ^ 1))[None, :]) & 15  # the first code of a byte is in its upper half
    value = tl.gather(tl.load(codes + tl.arange(0, 16)), tl.reshape(code, (8 * count,)), 0)
    weight = tl.reshape(value, (count, 8)) * scale[:, None]
    to = word_at[:, None] * 8 + place[None, :]
    if bf16:  # the bits are rounded here, because Triton's interpreter truncates where a card rounds to nearest
        bits = weight.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(decoded.to(tl.pointer_type(tl.int16)) + to, nearest.to(tl.int16), mask=here[:, None])
    else:
        tl.store(decoded + to, weight.to(decoded.dtype.element_ty), mask=here[:, None])


def can_decode(state: Any) -> bool:
    """Return whether :func:`decode` knows the format of a quantization state: NF4, as bitsandbytes makes it.

    A weight whose elements do not fill whole words is left to bitsandbytes. So is every weight where Triton is older
    than 3.3 (torch 2.6) and has no ``gather``.
    """
    if not hasattr(tl, "gather"):
        return False
    if state.quant_type != "nf4" or state.blocksize & (state.blocksize - 1) or state.shape.numel() % _CODES:
        return False
    return not state.nested or state.state2.blocksize == _SCALES_BLOCK


def decode(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """Decode a weight [out, in] to ``dtype``. The result equals that of bitsandbytes' own decoder bit for bit.

    Args:
        packed: the packed weight: uint8, contiguous, on the card.
        state: its quantization state, for which :func:`can_decode` returns true.
        dtype: fp32, bf16 or fp16.
    """
    words = state.shape.numel() // _CODES
    decoded: torch.Tensor = packed.new_empty(tuple(state.shape), dtype=dtype)
    inner = state.state2 if state.nested else None
    _decode[(-(-words // _WORDS),)](
        packed,
        decoded,
        state.code,
        state.absmax,
        state.code if inner is None else inner.code,
        state.absmax if inner is None else inner.absmax,
        state.absmax if inner is None else state.offset,
        words,
        bf16=dtype == torch.bfloat16,
        nested=inner is not None,
        block_words=state.blocksize // _CODES,
        scales_block=_SCALES_BLOCK,
        count=_WORDS,
        num_warps=4,
        enable_fp_fusion=False,  # the product must be rounded before the mean is added, as bitsandbytes does
    )
    return decoded
