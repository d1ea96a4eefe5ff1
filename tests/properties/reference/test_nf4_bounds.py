"""Error bounds and sizes of NF4 and FP4, tight: the worst input known comes within 1% of each bound."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import nf4
from reference.codebook import QuantType, codebook, derive_nf4, dynamic_map, half_gap, midpoints
from torch import Tensor
from weight_blocks import DTYPES, make_weights, ours, theirs, weights

BLOCK = 64
DIGITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}
"""Binary digits of each dtype, the hidden one included."""
MAP_HALF_GAP = 0.00703125
"""Half the widest cell of the 8-bit map."""
SNAP = 2.0**-15
"""What the CPU library's grid of 65,536 points adds."""
SOME = settings(max_examples=settings.default.max_examples)


def bound(x: Tensor, decoded: Tensor, absmax: Tensor, quant_type: QuantType = "nf4") -> Tensor:
    """Largest |decoded - x| of each value: half a gap of the table on its side of zero, and one rounding to dtype."""
    gap = torch.where(x >= 0, half_gap(quant_type, positive=True), half_gap(quant_type))
    scale = absmax.double().repeat_interleave(BLOCK)[: len(x)]
    _, exponent = torch.frexp(decoded.double())
    half_unit = torch.ldexp(torch.ones_like(scale), exponent - 1 - DIGITS[x.dtype])
    if x.dtype == torch.float16:
        half_unit = half_unit.clamp(min=2.0**-25)  # subnormal below 2^-14
    return scale * (gap.double() + 4 * 2.0**-24) + (half_unit if x.dtype != torch.float32 else 0.0)


def error(x: Tensor, decoded: Tensor) -> Tensor:
    return (decoded.double() - x.double()).abs()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@given(x=weights())
@SOME
def test_error_of_single_quantization_is_bounded(quant_type: QuantType, x: Tensor) -> None:
    for codec in (
        ours(quant_type=quant_type),
        ours(quant_type=quant_type, rules="cuda"),
        theirs(quant_type=quant_type),
    ):
        coded = codec(x)
        assert (error(x, coded.decoded) <= bound(x, coded.decoded, coded.absmax, quant_type)).all()


@given(x=weights(max_count=5000))
@SOME
def test_error_of_double_quantization_is_bounded(x: Tensor) -> None:
    for rules in ("cpu", "cuda"):
        plain, coded = ours(rules=rules)(x), ours(double_quant=True, rules=rules)(x)
        centred = (plain.absmax - plain.absmax.mean()).double()
        second = torch.stack([part.abs().max() for part in centred.split(256)]).repeat_interleave(256)[: len(centred)]
        slack = (MAP_HALF_GAP + SNAP) * second + 2 * 2.0**-23 * plain.absmax.abs().max().double()
        if rules == "cuda" and (plain.absmax == 0).any():
            continue  # an all-zero block is not a zero block there: see the CUDA rules' own tests
        assert ((coded.absmax.double() - plain.absmax.double()).abs() <= slack).all()
        per_value = slack.repeat_interleave(BLOCK)[: len(x)]
        assert (error(x, coded.decoded) <= bound(x, coded.decoded, plain.absmax) + per_value).all()


def worst_ratio(quant_type: QuantType, dtype: torch.dtype) -> float:
    """The largest share of the bound that any block of (scale, value just off the widest gap's middle) attains."""
    table = codebook(quant_type).sort().values
    middle = midpoints(table)[0]  # the widest gap, next to -1
    worst = 0.0
    scales = torch.linspace(1, 2, 257)[:-1].to(dtype)
    for step in (-1, 0, 1, 2):
        values = torch.zeros(len(scales), BLOCK, dtype=dtype)
        values[:, 0] = scales
        near = (middle * scales.float()).to(dtype)
        integer = near.view(torch.int32 if dtype == torch.float32 else torch.int16)
        values[:, 1] = (integer + step).to(integer.dtype).view(dtype)
        x = values.view(-1)
        coded = ours(quant_type=quant_type)(x)
        worst = max(worst, float((error(x, coded.decoded) / bound(x, coded.decoded, coded.absmax, quant_type)).max()))
    return worst


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bound_of_single_quantization_is_tight(quant_type: QuantType, dtype: torch.dtype) -> None:
    assert 0.99 < worst_ratio(quant_type, dtype) <= 1


def test_bound_above_zero_is_tighter_and_attained() -> None:
    assert half_gap("nf4", positive=True) == pytest.approx(0.13852158, abs=1e-8)
    assert half_gap("nf4") == pytest.approx(0.15190360, abs=1e-8)
    x = torch.zeros(BLOCK)
    x[:2] = torch.tensor([1.0, float(midpoints(codebook("nf4"))[14])])
    coded = ours()(x)
    assert float((error(x, coded.decoded) / bound(x, coded.decoded, coded.absmax)).max()) > 0.99
    assert float(error(x, coded.decoded).max()) < half_gap("nf4")  # the bound below zero is too loose here


def blocks_with_a_scale_on_a_cell_edge() -> Tensor:
    """256 blocks, of which one has the widest cell's edge for its centred scale, and holds the worst value for NF4.

    With scales 1, a and 254 times 0 the mean is (1 + a) / 256; (a - mean) / (1 - mean) = edge solves to the a below.
    """
    table = dynamic_map()
    edge = float(midpoints(table)[253]) + 4e-5  # between the two largest cells' middles, rounded up
    a = (edge * 255 + 1) / (255 + edge)
    x = torch.zeros(256, BLOCK)
    x[0, 0] = 1.0
    x[1, 0] = a
    x[1, 1] = float(midpoints(codebook("nf4"))[0]) * a - 1e-6
    return x.view(-1)


def test_bound_of_double_quantization_is_tight() -> None:
    x = blocks_with_a_scale_on_a_cell_edge()
    plain, double = ours()(x), ours(double_quant=True)(x)
    second = (plain.absmax - plain.absmax.mean()).abs().max().double()
    allowed = (MAP_HALF_GAP + SNAP) * second
    assert 0.99 < float((double.absmax - plain.absmax).abs()[1] / allowed) <= 1
    total = bound(x, double.decoded, plain.absmax) + allowed
    assert 0.99 < float((error(x, double.decoded) / total).max()) <= 1


def test_bound_rejects_a_codec_whose_scales_are_off_by_one_percent() -> None:
    x = make_weights("uniform", 4096, seed=0)
    coded = ours()(x)
    assert (error(x, coded.decoded) <= bound(x, coded.decoded, coded.absmax)).all()
    worse = coded.decoded * 1.01
    worst = torch.zeros(BLOCK)
    worst[:2] = torch.tensor([1.0, float(midpoints(codebook("nf4"))[0]) - 1e-6])
    coded = ours()(worst)
    worse = coded.decoded * 1.01
    assert not (error(worst, worse) <= bound(worst, worse, coded.absmax)).all()


def test_relative_error_of_a_small_block_among_large_ones_is_not_bounded() -> None:
    x = make_weights("normal", 16384, seed=0)
    x[:BLOCK] *= 1e-4
    coded = ours(double_quant=True)(x)
    plain = ours()(x)
    assert float(coded.absmax[0] / plain.absmax[0]) > 10


def test_the_table_is_the_one_that_the_paper_defines() -> None:
    assert (derive_nf4() - codebook("nf4").double()).abs().max() < 1e-6


# Bytes: what is really held, scales and tables included.


@given(
    blocks=st.integers(1, 12),
    blocksize=st.sampled_from(nf4.BLOCKSIZES),
    double_quant=st.booleans(),
    quant_type=st.sampled_from(["nf4", "fp4"]),
)
def test_bytes_are_those_of_the_formula(blocks: int, blocksize: int, double_quant: bool, quant_type: QuantType) -> None:
    count = blocks * 256 * blocksize  # whole second-level blocks
    coded = nf4.quantize(torch.zeros(count), quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
    tables = 16 * 4 + (256 * 4 + 4 if double_quant else 0)
    bits = nf4.bits_per_parameter(blocksize=blocksize, double_quant=double_quant)
    assert nf4.storage_bytes(coded) == count * bits / 8 + tables
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held(coded)}
    assert nf4.storage_bytes(coded) == sum(storages.values())


def held(coded: nf4.Quantized) -> list[Tensor]:
    tensors = [coded.packed, coded.absmax, coded.code]
    if coded.state2 is not None and coded.offset is not None:
        tensors += [coded.offset, coded.state2.absmax, coded.state2.code]
    return tensors


def test_bits_per_parameter_are_the_papers() -> None:
    assert nf4.bits_per_parameter() == 4.5
    assert nf4.bits_per_parameter(double_quant=True) == 4.126953125


@pytest.mark.parametrize("double_quant", [False, True])
def test_bytes_that_bitsandbytes_holds_are_the_same(double_quant: bool) -> None:
    layer = bitsandbytes.nn.Linear4bit(256, 128, bias=False, quant_type="nf4", compress_statistics=double_quant)
    state = layer.to("cpu").weight.quant_state
    tensors = [layer.weight.data, state.absmax, state.code]
    if double_quant:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    theirs_bytes = sum(t.untyped_storage().nbytes() for t in tensors)
    coded = nf4.from_bitsandbytes(layer.weight.data, state)
    assert theirs_bytes == nf4.storage_bytes(coded)
    assert (
        theirs_bytes
        == 256 * 128 / 2 + 512 * (1 if double_quant else 4) + (2 * 4 + 1024 + 4 if double_quant else 0) + 64
    )


def test_bytes_reject_forgotten_scales() -> None:
    coded = nf4.quantize(torch.zeros(64 * 256), double_quant=True)
    assert nf4.storage_bytes(coded) != coded.packed.nbytes
    assert coded.packed.nbytes * 8 / coded.shape.numel() == 4.0
