"""The value tables behind 4-bit and 8-bit blockwise quantization, and the thresholds that decide between their entries.

Every table is float32 and equals the one in bitsandbytes bit for bit; the tests hold them to it.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

QuantType = Literal["nf4", "fp4"]
"""The 4-bit types: NormalFloat (https://arxiv.org/abs/2305.14314) and a 1-2-1 bit float."""
Rules = Literal["cpu", "cuda"]
"""Whose arithmetic to follow where bitsandbytes' two libraries differ."""

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""NF4: quantiles of the normal distribution, seven below zero and eight above, zero and both ends exact."""

FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""FP4 magnitudes in code order (sign, exponent and mantissa bits), in twelfths. Codes 8 to 15 are their negatives."""

FP4_CUDA_PIVOTS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
"""The literals of the CUDA kernel's decision tree on |v|; rounded by hand there, so up to 4e-7 off the midpoints."""

NORMAL_OFFSET = (29 / 30 + 31 / 32) / 2
"""Probability of NF4's outermost quantile (QLoRA, appendix E): the mean of those of the two halves."""


def derive_nf4() -> Tensor:
    """NF4 from its definition: quantiles of N(0, 1), evenly spaced in probability in each half, divided by the largest.

    Returns:
        float64 [16], sorted; agrees with `NF4_VALUES` to 1e-6. The published table was made from a rounded offset
        (0.9677083), in float32.

    Source: https://arxiv.org/abs/2305.14314, section 3 and appendix E.
    """
    upper = torch.special.ndtri(torch.linspace(0.5, NORMAL_OFFSET, 9, dtype=torch.float64)[1:])
    lower = torch.special.ndtri(torch.linspace(0.5, NORMAL_OFFSET, 8, dtype=torch.float64)[1:])
    table: Tensor = torch.cat([-lower.flip(0), torch.zeros(1, dtype=torch.float64), upper]) / upper[-1]
    return table


@cache
def codebook(quant_type: QuantType) -> Tensor:
    """Value of each 4-bit code.

    Args:
        quant_type: "nf4" or "fp4".

    Returns:
        float32 [16], indexed by code. Shared: do not write to it.

    Raises:
        ValueError: for another type.
    """
    if quant_type == "nf4":
        return torch.tensor(NF4_VALUES, dtype=torch.float32)
    if quant_type == "fp4":
        magnitudes = torch.tensor(FP4_TWELFTHS, dtype=torch.float32) / 12
        negatives = -magnitudes
        negatives[0] = 0.0  # code 8 is a second zero, not a negative one: what the CPU library's table says
        return torch.cat([magnitudes, negatives])
    raise ValueError(f"quant_type = {quant_type!r}: not a 4-bit type; use 'nf4' or 'fp4'")


def midpoints(values: Tensor) -> Tensor:
    """Decision thresholds between neighbours of a sorted table: (c[i] + c[i+1]) / 2 in its own dtype, [n - 1]."""
    return (values[:-1] + values[1:]) / 2


def half_gap(quant_type: QuantType, *, positive: bool = False) -> float:
    """Largest error of rounding a value in [-1, 1] to the 4-bit table; with ``positive``, of one in [0, 1].

    NF4: 0.1519036 (between -1 and -0.696), and 0.1385216 above zero. FP4: 1/6 on both sides.
    """
    values = codebook(quant_type).double().sort().values
    if positive:
        values = values[values >= 0]
    return float((values[1:] - values[:-1]).max() / 2)


@cache
def dynamic_map(*, signed: bool = True) -> Tensor:
    """The dynamic 8-bit map: seven decades, each split into twice as many cells as the one below it.

    Decade i (0 to 6) is [0.1, 1] * 10^(i-6) cut into 2^i equal cells (2^(i+1) when unsigned); the entries are
    the cells' mid-points, with both signs or one, and 0 and 1.

    Args:
        signed: True for second-level absmax and Adam's first moment, False for Adam's second moment.

    Returns:
        float32 [256], sorted. Shared: do not write to it.

    Source: https://arxiv.org/abs/2110.02861, section 1.3.
    """
    entries = [0.0, 1.0]
    for decade in range(7):
        cells = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, cells + 1, dtype=torch.float32)
        means = (10 ** (decade - 6)) * midpoints(edges)
        entries += means.tolist()
        if signed:
            entries += (-means).tolist()
    return torch.tensor(sorted(entries), dtype=torch.float32)


@cache
def snapped_lookup(*, signed: bool = True) -> Tensor:
    """What the CPU library's 8-bit quantizer looks codes up in: the entry nearest to each of 65,536 grid points.

    Grid point k is -1 + 2k/65535. Zero is none of them (it lies half way between 32767 and 32768), so that an exact
    zero is encoded as the entry nearest to 1.5e-5: bitsandbytes 0.50 loses zeros on the CPU.

    Returns:
        uint8 [65536]. Shared: do not write to it.
    """
    grid = -1.0 + torch.arange(65536, dtype=torch.float32) * 2.0 / 65535
    return torch.searchsorted(midpoints(dynamic_map(signed=signed)), grid).to(torch.uint8)
