"""NF4 weights decoded in one launch are bitsandbytes' own, bit for bit, whatever their shape and scales."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import nf4
from weight_blocks import make_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

triton_language = pytest.importorskip("triton.language")
if not hasattr(triton_language, "gather"):
    pytest.skip("bitsandbytes decodes the weights with this Triton, which has no gather", allow_module_level=True)
FEW = settings(max_examples=max(10, settings.default.max_examples // 4), deadline=None)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    """The module, under Triton's interpreter, which is chosen when a kernel is defined."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delitem(sys.modules, "finetune.kernels.nf4", raising=False)
        yield importlib.import_module("finetune.kernels.nf4")
    sys.modules.pop("finetune.kernels.nf4", None)


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 300) | st.integers(1, 40).map(lambda words: 8 * words),
    double_quant=st.booleans(),
    blocksize=st.sampled_from([64, 128]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@FEW
def test_the_bits_are_bitsandbytes_own(
    kernel: Any, rows: int, columns: int, double_quant: bool, blocksize: int, dtype: torch.dtype, seed: int
) -> None:
    weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)
    packed, state = bnb_functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4"
    )
    assert kernel.can_decode(state) == (rows * columns % 8 == 0)  # codes that fill words; the others are left
    if not kernel.can_decode(state):
        return
    decoded = kernel.decode(packed, state, dtype)
    assert decoded.shape == weight.shape
    assert torch.equal(decoded, bnb_functional.dequantize_4bit(packed, state))


def test_more_than_one_program_and_more_than_one_scale_of_scales(kernel: Any) -> None:
    """Against the reference codec, at a size where every table has several entries."""
    weight = make_weights("normal", 300 * 256, seed=1).view(300, 256)
    packed, state = bnb_functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert state.state2.absmax.numel() > 1
    exact = nf4.dequantize(nf4.quantize(weight, double_quant=True))
    assert torch.equal(kernel.decode(packed, state, torch.float32), exact)
    state.offset += 1e-3  # the control: the mean counts
    assert not torch.equal(kernel.decode(packed, state, torch.float32), exact)


def test_other_formats_are_left_to_bitsandbytes(kernel: Any) -> None:
    weight = torch.randn(8, 64)
    _, fp4 = bnb_functional.quantize_4bit(weight, quant_type="fp4")
    assert not kernel.can_decode(fp4)
    _, state = bnb_functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    state.state2.blocksize = 512
    assert not kernel.can_decode(state)
