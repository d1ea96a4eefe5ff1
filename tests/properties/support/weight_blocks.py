"""Weights to quantize, the awkward ones included, and the codecs under test behind one face."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import bitsandbytes.functional as bnb
import torch
from hypothesis import strategies as st
from reference import nf4
from reference.codebook import Rules, codebook, midpoints
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXPONENTS = {torch.float32: (-20.0, 20.0), torch.bfloat16: (-20.0, 20.0), torch.float16: (-4.0, 4.0)}
KINDS = ("normal", "uniform", "sparse", "constant", "grid", "threshold", "outlier", "two scales")


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """What a codec made of a tensor."""

    codes: Tensor
    absmax: Tensor
    decoded: Tensor


Codec = Callable[[Tensor], Coded]


def ours(
    *, rules: Rules = "cpu", blocksize: int = 64, double_quant: bool = False, quant_type: nf4.QuantType = "nf4"
) -> Codec:
    """The reference codec."""

    def codec(tensor: Tensor) -> Coded:
        coded = nf4.quantize(tensor, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant, rules=rules)
        codes = nf4.unpack(coded.packed)[: tensor.numel()]
        return Coded(codes=codes, absmax=nf4.scales(coded), decoded=nf4.dequantize(coded))

    return codec


def theirs(*, blocksize: int = 64, double_quant: bool = False, quant_type: nf4.QuantType = "nf4") -> Codec:
    """bitsandbytes on the CPU. The tensor is flattened to one row, which its decoder always gets right."""

    def codec(tensor: Tensor) -> Coded:
        packed, state = bnb.quantize_4bit(
            tensor.reshape(1, -1), blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type
        )
        decoded = bnb.dequantize_4bit(packed, state).reshape(tensor.shape)
        absmax = state.absmax
        if double_quant:
            absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        return Coded(codes=nf4.unpack(packed)[: tensor.numel()], absmax=absmax, decoded=decoded)

    return codec


def make_weights(
    kind: str, count: int, *, seed: int, exponent: float = 0.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """One flat tensor of a kind, its largest magnitude about 10^exponent."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    table = codebook("nf4").double()
    if kind == "normal":
        values = normal
    elif kind == "uniform":
        values = uniform * 2 - 1
    elif kind == "sparse":
        values = normal * (uniform < 0.05)
    elif kind == "constant":
        values = torch.full((count,), float(normal[0]) if count else 0.0, dtype=torch.float64)
    elif kind == "grid":
        values = table[torch.randint(0, 16, (count,), generator=generator)]
    elif kind == "threshold":
        # On a threshold, or one or two units in the last place to either side, in blocks whose scale is exactly 1.
        chosen = midpoints(codebook("nf4"))[torch.randint(0, 15, (count,), generator=generator)]
        steps = torch.randint(-2, 3, (count,), generator=generator, dtype=torch.int32)
        values = (chosen.view(torch.int32) + steps).view(torch.float32).double()
        values[::32] = 1.0
        exponent = 0.0
    elif kind == "outlier":
        values = normal * 1e-3
        values[::101] = 1.0
    elif kind == "two scales":
        values = normal * torch.where(torch.arange(count) // 64 % 2 == 0, 1.0, 1e-3)
    else:
        raise ValueError(kind)
    return (values * 10.0**exponent).to(dtype)


@st.composite
def weights(
    draw: st.DrawFn, *, max_count: int = 600, dtypes: tuple[torch.dtype, ...] = DTYPES, multiple_of: int = 1
) -> Tensor:
    """Flat tensors of 1 to ``max_count`` values of every kind, dtype and scale; shrinks towards a few, normal, fp32."""
    count = draw(st.integers(1, math.ceil(max_count / multiple_of))) * multiple_of
    kind = draw(st.sampled_from(KINDS))
    dtype = draw(st.sampled_from(dtypes))
    exponent = draw(st.floats(*EXPONENTS[dtype], allow_nan=False).map(lambda e: round(e, 2)))
    return make_weights(kind, count, seed=draw(st.integers(0, 2**16)), exponent=exponent, dtype=dtype)


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes as integers, so that equality is of bits: -0.0 is not 0.0, and NaN equals itself."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(integer)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same bytes in the same shape and dtype."""
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(bits(left), bits(right))
