"""Reference codec for 8-bit blockwise quantization with the dynamic map: 4-bit scales, and 8-bit optimizer states.

Source: https://arxiv.org/abs/2110.02861.
"""

from __future__ import annotations

import torch
from reference.codebook import Rules, dynamic_map, midpoints, snapped_lookup
from torch import Tensor

NESTED_BLOCKSIZE = 256
"""Values that share one scale, for scales of 4-bit blocks and for optimizer states alike."""


def quantize_blockwise(
    values: Tensor, *, blocksize: int = NESTED_BLOCKSIZE, signed: bool = True, rules: Rules = "cpu"
) -> tuple[Tensor, Tensor]:
    """Quantize to 8 bits with the dynamic map: scales, and the states of 8-bit optimizers.

    Args:
        values: any shape, finite, fp32, bf16 or fp16; read as fp32.
        blocksize: values that share one scale; optimizers use 256.
        signed: the signed map, or the unsigned one of Adam's second moment.
        rules: "cuda" takes the nearest entry, the even index at equal distance; "cpu" first snaps to a grid of 65,536
            points, so that zero does not stay zero, except in a block of zeros.

    Returns:
        uint8 codes of the input's shape, and float32 [blocks] largest magnitudes.
    """
    check_rules(rules)
    flat = values.detach().reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)
    absmax = row_max(blocks.abs())
    table = dynamic_map(signed=signed)
    scaled = blocks * (1.0 / absmax)[:, None]
    if rules == "cpu":
        snapped = ((scaled.nan_to_num(0.0).clamp(-1, 1) + 1.0) * 0.5 * 65535 + 0.5).long()
        codes = snapped_lookup(signed=signed)[snapped]
    else:
        bounds = midpoints(table)
        below = torch.bucketize(scaled, bounds)
        on_bound = bounds[below.clamp(max=254)] == scaled
        codes = (below + (on_bound & (below % 2 == 1))).to(torch.uint8)
    codes = codes.masked_fill((absmax == 0)[:, None], 0)
    return codes.reshape(-1)[: flat.numel()].reshape(values.shape), absmax


def dequantize_blockwise(
    codes: Tensor,
    absmax: Tensor,
    *,
    blocksize: int = NESTED_BLOCKSIZE,
    signed: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Decode 8-bit codes: the map's entry times the block's scale in fp32, rounded once to ``dtype``.

    Returns:
        The codes' shape.
    """
    per_value = absmax.repeat_interleave(blocksize)[: codes.numel()]
    return (dynamic_map(signed=signed)[codes.reshape(-1).long()] * per_value).to(dtype).reshape(codes.shape)


def row_max(rows: Tensor) -> Tensor:
    """Largest value of each row, NaN if it holds one; of no rows, nothing."""
    return rows.amax(dim=1) if rows.numel() else rows.new_zeros(0)


def check_rules(rules: str) -> None:
    """Refuse rules that are neither library's.

    Raises:
        ValueError: naming the value.
    """
    if rules not in ("cpu", "cuda"):
        raise ValueError(f"rules = {rules!r}: no such library; use 'cpu' or 'cuda'")
