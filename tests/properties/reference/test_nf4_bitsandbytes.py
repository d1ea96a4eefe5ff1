"""The reference codec is bitsandbytes' bit for bit wherever that is right, and its defects are shown by name.

Each defect is a strict xfail: the day bitsandbytes mends it, the test fails, and says that a work-around can go. Those
that only some processors have are expected on these alone.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch
from cpu_paths import AVX512, AVX512_BF16, decoded_wrongly
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import blockwise, nf4
from reference.codebook import QuantType, codebook, dynamic_map, midpoints
from torch import Tensor
from weight_blocks import DTYPES, EXPONENTS, KINDS, make_weights, same_bits, weights

from finetune.model import experts

REPORTS = Path(__file__).parents[3] / "examples" / "bitsandbytes_reports"
MANY = settings(max_examples=settings.default.max_examples * 5)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """One to seven rows of 1 to 300 columns, the awkward column counts preferred; some of subnormal numbers."""
    rows = draw(st.integers(1, 7))
    columns = draw(st.sampled_from([1, 2, 3, 15, 16, 17, 32, 48, 63, 64, 65, 80, 96, 128, 256, 300]))
    dtype = draw(st.sampled_from(DTYPES))
    subnormal = st.floats(-8, -5) if dtype == torch.float16 else st.floats(-46, -37)
    exponent = draw((st.floats(*EXPONENTS[dtype]) | subnormal).map(lambda e: round(e, 2)))
    kind = draw(st.sampled_from(KINDS))
    flat = make_weights(kind, rows * columns, seed=draw(st.integers(0, 2**16)), exponent=exponent, dtype=dtype)
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 2]))):
        flat[draw(st.integers(0, len(flat) - 1))] = draw(st.sampled_from([float("inf"), float("-inf"), float("nan")]))
    return flat.view(rows, columns)


@given(
    x=matrices(),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from(nf4.BLOCKSIZES),
    double_quant=st.booleans(),
)
@MANY
def test_quantization_is_bit_exact(x: Tensor, quant_type: QuantType, blocksize: int, double_quant: bool) -> None:
    finite = bool(x.isfinite().all())
    double_quant = double_quant and finite  # one non-finite scale makes the mean, and so every scale, non-finite
    packed, state = bnb.quantize_4bit(x, quant_type=quant_type, blocksize=blocksize, compress_statistics=double_quant)
    coded = nf4.quantize(x, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
    assert same_bits(coded.packed, packed)
    assert torch.equal(coded.absmax.nan_to_num(-1.0), state.absmax.nan_to_num(-1.0))
    if double_quant:
        assert coded.offset is not None
        assert coded.state2 is not None
        assert same_bits(coded.offset, state.offset)
        assert same_bits(coded.state2.absmax, state.state2.absmax)
    if decoded_wrongly(x.shape, blocksize) or not finite:
        return
    decoded, theirs = nf4.dequantize(coded), bnb.dequantize_4bit(packed, state).reshape(x.shape)
    if x.dtype == torch.bfloat16 and AVX512_BF16:
        # vcvtneps2bf16 flushes subnormal numbers; what is left of a row beyond whole vectors is rounded without it.
        decoded = decoded.masked_fill((decoded.abs() < 2.0**-126) & (theirs == 0), 0.0)
    assert torch.equal(decoded, theirs)
    assert torch.equal(nf4.dequantize(nf4.from_bitsandbytes(packed, state)), nf4.dequantize(coded))


def on_the_edge_of_division() -> tuple[Tensor, Tensor]:
    """Scales and values for which x / scale and x * (1 / scale) lie on different sides of a threshold."""
    generator = torch.Generator().manual_seed(0)
    scales = 1 + torch.rand(20000, generator=generator)
    thresholds = midpoints(codebook("nf4"))
    chosen = thresholds[torch.randint(0, 15, (20000,), generator=generator)]
    values = chosen * scales
    divided = torch.bucketize(values / scales, thresholds)
    multiplied = torch.bucketize(values * (1 / scales), thresholds)
    differ = divided != multiplied
    assert differ.sum() > 100
    return scales[differ][:50], values[differ][:50]


def test_a_partial_block_is_divided_and_a_whole_one_multiplied_by_the_reciprocal() -> None:
    for scale, value in zip(*on_the_edge_of_division(), strict=True):
        partial = torch.stack([scale, value])[None]
        whole = torch.zeros(1, 64)
        whole[0, :2] = partial
        for x in (partial, whole):
            packed, _ = bnb.quantize_4bit(x, quant_type="nf4")
            assert same_bits(nf4.quantize(x).packed, packed)
        assert nf4.quantize(partial).packed[0] != nf4.quantize(whole).packed[0]


@given(x=weights(), quant_type=st.sampled_from(["nf4", "fp4"]), wrong=st.sampled_from(["rules", "blocksize", "type"]))
@settings(max_examples=20)
def test_the_comparison_can_fail(x: Tensor, quant_type: QuantType, wrong: str) -> None:
    x = make_weights("normal", 4096, seed=1) + x.float().mean().clamp(-1, 1)
    packed, _ = bnb.quantize_4bit(x, quant_type=quant_type, blocksize=64)
    other: QuantType = "fp4" if quant_type == "nf4" else "nf4"
    if wrong == "rules":
        x = x.clone()
        x[:64] = 0  # the CUDA kernel gives a block of zeros code 0, the CPU's code 7
        packed, _ = bnb.quantize_4bit(x, quant_type="nf4", blocksize=64)
        coded = nf4.quantize(x, rules="cuda")
    elif wrong == "blocksize":
        coded = nf4.quantize(x, quant_type=quant_type, blocksize=128)
    else:
        coded = nf4.quantize(x, quant_type=other)
    assert not same_bits(coded.packed, packed)


@given(x=weights(), blocksize=st.sampled_from([64, 256, 2048]), signed=st.booleans())
@MANY
def test_eight_bits_are_bit_exact(x: Tensor, blocksize: int, signed: bool) -> None:
    table = bnb.create_dynamic_map(signed=signed)
    assert same_bits(table, dynamic_map(signed=signed))
    x = x if signed else x.abs()
    codes, state = bnb.quantize_blockwise(x, code=table, blocksize=blocksize)
    our_codes, our_absmax = blockwise.quantize_blockwise(x, blocksize=blocksize, signed=signed)
    assert same_bits(our_codes, codes)
    assert same_bits(our_absmax, state.absmax)
    decoded = blockwise.dequantize_blockwise(codes, state.absmax, blocksize=blocksize, signed=signed, dtype=x.dtype)
    assert torch.equal(decoded, bnb.dequantize_blockwise(codes, state))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_tables_are_bit_exact(quant_type: QuantType) -> None:
    assert same_bits(codebook(quant_type), bnb.get_4bit_type(quant_type, device="cpu"))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_dict_is_bitsandbytes_own(dtype: torch.dtype, quant_type: QuantType, double_quant: bool) -> None:
    weight = make_weights("normal", 128 * 48, seed=0, dtype=dtype).view(48, 128)
    layer = bitsandbytes.nn.Linear4bit(128, 48, bias=False, quant_type=quant_type, compress_statistics=double_quant)
    layer.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, quant_type=quant_type, compress_statistics=double_quant
    )
    layer = layer.to("cpu")
    theirs = layer.state_dict()
    coded = nf4.quantize(weight, quant_type=quant_type, double_quant=double_quant)
    saved = nf4.state_dict(coded)
    assert saved.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert same_bits(saved[key], tensor), key
    read = nf4.from_state_dict(saved)
    assert torch.equal(nf4.dequantize(read), nf4.dequantize(coded))
    inner = {key.removeprefix("weight."): tensor for key, tensor in saved.items() if key != "weight"}
    state = bnb.QuantState.from_dict(inner, device=torch.device("cpu"))
    assert torch.equal(bnb.dequantize_4bit(saved["weight"], state), nf4.dequantize(coded))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_storage_dtype_is_a_view_of_the_same_bytes(storage: torch.dtype) -> None:
    weight = make_weights("normal", 512, seed=0).view(4, 128)
    packed, _ = bnb.quantize_4bit(weight, quant_type="nf4", quant_storage=storage)
    coded = nf4.quantize(weight, storage=storage)
    assert same_bits(coded.packed, packed)
    assert torch.equal(nf4.dequantize(coded), nf4.dequantize(nf4.quantize(weight)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_results_vanish_in_bf16_where_the_processor_rounds_to_it(dtype: torch.dtype) -> None:
    """No defect: AVX512_BF16's instruction flushes them, torch's own rounding and every other path keep them."""
    scale = 2.0**-13 if dtype == torch.float16 else 2.0**-124
    x = torch.full((1, 64), 0.08 * scale).to(dtype)
    x[0, 0] = scale
    packed, state = bnb.quantize_4bit(x, quant_type="nf4")
    decoded, reference = bnb.dequantize_4bit(packed, state), nf4.dequantize(nf4.quantize(x))
    assert 0 < reference[0, 1] < torch.finfo(dtype).tiny
    if dtype == torch.bfloat16 and AVX512_BF16:
        assert decoded[0, 1] == 0
    else:
        assert torch.equal(decoded, reference)


@pytest.mark.parametrize("columns", [16, 48, 64, 18, 62])
def test_the_sign_of_fp4s_second_zero_is_the_decoders(columns: int) -> None:
    """No defect: code 8 is a zero below zero. The AVX-512 decoder's table has 0.0 for it, the other decoder's -0.0.

    Rows that are no multiple of 16 wide take the other decoder on every processor. The reference has 0.0.
    """
    packed = torch.full((columns, 1), 0x88, dtype=torch.uint8)
    absmax = torch.ones(-(2 * columns // -64))
    state = bnb.QuantState(
        absmax,
        shape=torch.Size((2, columns)),
        code=codebook("fp4"),
        blocksize=64,
        quant_type="fp4",
        dtype=torch.float32,
    )
    decoded = bnb.dequantize_4bit(packed, state)
    assert torch.equal(decoded, torch.zeros(2, columns))
    assert bool(decoded.signbit().all()) == (not AVX512 or columns % 16 != 0)
    assert bool(decoded.signbit().any()) == bool(decoded.signbit().all())
    reference = nf4.dequantize(nf4.from_bitsandbytes(packed, state))
    assert same_bits(reference, torch.zeros(2, columns))


# Defects of bitsandbytes. Each has a report ready to send, whose script is run below.


@pytest.mark.xfail(AVX512, strict=True, reason="1-wrong-scales-avx512.md: scales are counted row by row")
@pytest.mark.parametrize("shape", [(8, 48), (6, 32), (3, 80), (5, 96)])
def test_defect_scales_of_rows_that_split_blocks(shape: tuple[int, int]) -> None:
    assert experts.decoded_wrongly(torch.Size(shape))
    x = make_weights("uniform", shape[0] * shape[1], seed=0).view(shape)
    packed, state = bnb.quantize_4bit(x, quant_type="nf4")
    assert torch.equal(bnb.dequantize_4bit(packed, state), nf4.dequantize(nf4.quantize(x)))


@given(rows=st.integers(1, 6), columns=st.integers(1, 200), blocksize=st.sampled_from(nf4.BLOCKSIZES))
@MANY
def test_every_other_shape_is_decoded_right(rows: int, columns: int, blocksize: int) -> None:
    x = make_weights("normal", rows * columns, seed=0).view(rows, columns)
    packed, state = bnb.quantize_4bit(x, quant_type="nf4", blocksize=blocksize)
    right = torch.equal(
        bnb.dequantize_4bit(packed, state).view_as(x), nf4.dequantize(nf4.quantize(x, blocksize=blocksize))
    )
    assert right or decoded_wrongly(x.shape, blocksize)


@pytest.mark.xfail(strict=True, reason="2-zeros-lost.md: values are snapped to a grid without zero")
@pytest.mark.parametrize("signed", [True, False])
def test_defect_eight_bit_zeros(signed: bool) -> None:
    x = torch.zeros(256)
    x[0] = 1.0
    codes, state = bnb.quantize_blockwise(x, code=bnb.create_dynamic_map(signed=signed), blocksize=256)
    assert torch.equal(bnb.dequantize_blockwise(codes, state), x)


def small_layer() -> bitsandbytes.nn.Linear4bit:
    torch.manual_seed(0)
    return bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")


@pytest.mark.xfail(AVX512_BF16, strict=True, reason="3-evaluation-overwrites-weights.md: repacked in place for bf16")
def test_defect_evaluation_overwrites_the_weights() -> None:
    layer = small_layer()
    before = layer.weight.data.clone()
    layer.eval()
    with torch.no_grad():
        layer(torch.ones(2, 64))
    assert same_bits(layer.weight.data, before)


def test_evaluation_keeps_the_weights_when_the_repacking_is_turned_off() -> None:
    layer = small_layer()
    layer.support_avx512bf16_for_cpu = False
    before, x = layer.weight.data.clone(), torch.ones(2, 64)
    trained = layer(x.clone().requires_grad_())
    layer.eval()
    with torch.no_grad():
        assert same_bits(layer(x), trained.detach())
    assert same_bits(layer.weight.data, before)


@pytest.mark.xfail(strict=True, reason="4-nan-becomes-zero.md: rounding to bf16 overflows for a NaN with all bits set")
def test_defect_nan_becomes_zero() -> None:
    packed, state = bnb.quantize_4bit(torch.ones(2, 8, dtype=torch.bfloat16), quant_type="nf4")
    state.absmax = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    assert bnb.dequantize_4bit(packed, state).isnan().all()


SHOWN_ON = {"1": AVX512, "2": True, "3": AVX512_BF16, "4": True}


@pytest.mark.parametrize("report", sorted(REPORTS.glob("*.md")), ids=lambda path: path.stem)
def test_report_shows_what_it_says(report: Path) -> None:
    """The script prints what the report says where the processor has the defect, and something else elsewhere."""
    script, expected = re.findall(r"```(?:python)?\n(.*?)```", report.read_text(), flags=re.DOTALL)[:2]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(script, report.name, "exec"), {})
    assert (printed.getvalue() == expected) == SHOWN_ON[report.name[0]], printed.getvalue()


def test_there_is_a_report_for_every_defect() -> None:
    assert sorted(path.name[0] for path in REPORTS.glob("*.md")) == sorted(SHOWN_ON)
