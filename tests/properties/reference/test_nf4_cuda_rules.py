"""What the CUDA kernels do differently, read from their source (csrc/kernels.cu at 95f9af30): no GPU was asked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import nf4
from reference.blockwise import dequantize_blockwise, quantize_blockwise
from reference.codebook import FP4_CUDA_PIVOTS, codebook, dynamic_map, midpoints
from torch import Tensor
from weight_blocks import make_weights, ours, weights

# The literals of the NF4 decision tree, as dQuantizeNF4 has them.
NF4_PIVOTS = (
    -0.8480964004993439,
    -0.6106329262256622,
    -0.4599952697753906,
    -0.33967943489551544,
    -0.23460740596055984,
    -0.13791173323988914,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552504837513,
    0.2035212516784668,
    0.2920137718319893,
    0.3893125355243683,
    0.5016634166240692,
    0.6427869200706482,
    0.8614784181118011,
)


def test_nf4_thresholds_are_the_decision_trees() -> None:
    assert torch.equal(midpoints(codebook("nf4")), torch.tensor(NF4_PIVOTS))


def test_fp4_thresholds_are_close_to_the_midpoints_but_not_equal() -> None:
    middles = midpoints(codebook("fp4")[:8].sort().values)
    difference = (torch.tensor(FP4_CUDA_PIVOTS) - middles).abs()
    assert 0 < difference.max() < 4e-7


@pytest.mark.parametrize(
    ("value", "magnitude"), [(0.583333, 0.5), (0.5833331, 8 / 12), (0.00260417, 0.0), (0.0026042, 1 / 192), (1.0, 1.0)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_fp4_is_symmetric_and_takes_the_smaller_magnitude_on_a_threshold(
    value: float, magnitude: float, sign: int
) -> None:
    codes = nf4.encode(torch.tensor([sign * value]), quant_type="fp4", rules="cuda")
    assert codebook("fp4")[codes.long()].item() == pytest.approx(sign * magnitude, abs=1e-7)


@given(x=weights(multiple_of=64))
def test_fp4_negation_commutes_on_cuda(x: Tensor) -> None:
    codec = ours(quant_type="fp4", rules="cuda")
    assert torch.equal(codec(-x).decoded, -codec(x).decoded)


def test_fp4_negation_does_not_commute_on_the_cpu() -> None:
    edge = midpoints(codebook("fp4").sort().values)[-1]
    x = torch.tensor([1.0, edge, -edge, 0.0])
    assert not torch.equal(ours(quant_type="fp4")(-x).decoded, -ours(quant_type="fp4")(x).decoded)


@given(x=weights(multiple_of=64))
def test_rules_agree_on_whole_blocks_that_hold_something(x: Tensor) -> None:
    if any(not block.any() for block in x.split(64)):
        return
    by_cpu, by_cuda = ours()(x), ours(rules="cuda")(x)
    assert torch.equal(by_cpu.codes, by_cuda.codes)
    assert torch.equal(by_cpu.absmax, by_cuda.absmax)
    assert torch.equal(by_cpu.decoded, by_cuda.decoded)


def test_a_block_of_zeros_decodes_to_zero_by_either_rules() -> None:
    x = make_weights("normal", 128, seed=0)
    x[:64] = 0
    by_cpu, by_cuda = ours()(x), ours(rules="cuda")(x)
    assert (by_cpu.codes[:64] == 7).all()
    assert (by_cuda.codes[:64] == 0).all()
    assert (by_cpu.decoded[:64] == 0).all()
    assert (by_cuda.decoded[:64] == 0).all()


def test_double_quantization_makes_a_block_of_zeros_constant_on_cuda() -> None:
    x = make_weights("normal", 64 * 40, seed=3)
    x[:64] = 0
    x[-64:] *= 3
    by_cpu, by_cuda = ours(double_quant=True)(x), ours(rules="cuda", double_quant=True)(x)
    assert (by_cpu.decoded[:64] == 0).all()
    assert by_cuda.absmax[0] != 0
    assert (by_cuda.decoded[:64] == -by_cuda.absmax[0]).all()


def test_partial_block_of_zeros_keeps_its_zero_scale_on_cuda() -> None:
    assert ours(rules="cuda")(torch.zeros(10)).absmax.item() == 0
    assert ours()(torch.zeros(10)).absmax.item() == pytest.approx(1e-38)


def test_nan_poisons_the_block_on_the_cpu_and_one_value_on_cuda() -> None:
    x = make_weights("uniform", 128, seed=0)
    x[3] = float("nan")
    by_cpu, by_cuda = ours()(x).decoded, ours(rules="cuda")(x).decoded
    assert by_cpu[:64].isnan().all()
    assert by_cpu[64:].isfinite().all()
    assert by_cuda.isfinite().all()
    assert by_cuda[3] == -by_cuda[:64].abs().max()


@pytest.mark.parametrize("infinite", [float("inf"), float("-inf")])
def test_an_infinite_value_leaves_nothing_of_its_block(infinite: float) -> None:
    x = make_weights("uniform", 64, seed=0)
    x[5] = infinite
    decoded = ours()(x).decoded
    assert decoded[5] == float("inf")  # of the other sign, if it was negative
    assert decoded[torch.arange(64) != 5].isnan().all()
    assert ours()(x).absmax.item() == float("inf")


# The 8-bit level: CUDA searches the map, the CPU library snaps to a grid first.


@given(index=st.integers(0, 254), signed=st.booleans())
@settings(max_examples=settings.default.max_examples * 3)
def test_eight_bit_ties_go_to_the_even_index_on_cuda(index: int, signed: bool) -> None:
    table = dynamic_map(signed=signed)
    middle = midpoints(table)[index]
    values = torch.zeros(256)
    values[:4] = torch.stack(
        [torch.tensor(1.0), middle, torch.nextafter(middle, table[255]), torch.nextafter(middle, table[0])]
    )
    codes, _ = quantize_blockwise(values, signed=signed, rules="cuda")
    assert codes[1] == index + index % 2
    assert codes[2] == index + 1
    assert codes[3] == index


@given(x=weights(multiple_of=64), signed=st.booleans())
def test_eight_bits_are_nearest_on_cuda_and_zero_stays(x: Tensor, signed: bool) -> None:
    x = x.float() if signed else x.float().abs()
    codes, absmax = quantize_blockwise(x, signed=signed, rules="cuda")
    decoded = dequantize_blockwise(codes, absmax, signed=signed)
    assert (decoded[x == 0] == 0).all()
    scale = absmax.double().repeat_interleave(256)[: len(x)]
    entries = dynamic_map(signed=signed).double() * scale[:, None]
    best = (entries - x.double()[:, None]).abs().min(dim=1).values
    assert ((decoded.double() - x.double()).abs() <= best + 4 * 2.0**-23 * scale).all()


def test_eight_bit_zero_does_not_stay_zero_by_the_cpus_rules() -> None:
    x = torch.zeros(256)
    x[0] = 1.0
    for signed, lost in ((True, 2.125e-5), (False, 1.5625e-5)):
        codes, absmax = quantize_blockwise(x, signed=signed)
        assert dequantize_blockwise(codes, absmax, signed=signed)[1].item() == pytest.approx(lost)


# What is refused, and how.


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool])
def test_other_dtypes_are_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"{dtype}.*cast to fp32"):
        nf4.quantize(torch.zeros(4, dtype=dtype))


def test_other_blocksizes_types_and_rules_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"blocksize = 48.*32, 64"):
        nf4.quantize(torch.zeros(4), blocksize=48)
    with pytest.raises(ValueError, match=r"quant_type = 'nf5'.*'nf4' or 'fp4'"):
        nf4.quantize(torch.zeros(4), quant_type="nf5")  # type: ignore[arg-type]  # a wrong value, which is tested
    with pytest.raises(ValueError, match=r"rules = 'rocm'.*'cpu' or 'cuda'"):
        nf4.quantize(torch.zeros(4), rules="rocm")  # type: ignore[arg-type]  # a wrong value, which is tested
    with pytest.raises(ValueError, match=r"storage = torch.float32: 3 bytes"):
        nf4.quantize(torch.zeros(6), storage=torch.float32)
    with pytest.raises(ValueError, match=r"prefix = 'weight'.*holds bias"):
        nf4.from_state_dict({"bias": torch.zeros(1)})


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_an_empty_tensor_stays_empty(shape: tuple[int, ...]) -> None:
    coded = nf4.quantize(torch.zeros(shape))
    assert nf4.dequantize(coded).shape == shape
    assert coded.absmax.numel() == 0
