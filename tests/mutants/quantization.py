"""Bugs in numbers in 4 and 8 bits, and a mixture's experts in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mutants import Planted

BUGS: dict[str, Planted] = {
    "tests/reference/nf4": (
        [
            "tests/properties/reference/test_nf4_invariants.py",
            "tests/properties/reference/test_nf4_bounds.py",
            "tests/properties/reference/test_nf4_bitsandbytes.py",
            "tests/properties/reference/test_nf4_cuda_rules.py",
        ],
        [
            ("(codes[::2] << 4) | codes[1::2]", "(codes[1::2] << 4) | codes[::2]"),
            ("scaled[-1] = (blocks[-1] / absmax[-1]).clamp(-1, 1)", "pass"),
            ("* per_scale + quantized.offset", "* per_scale"),
            ("codes = codes.masked_fill(scaled.isnan(), 0)", "pass"),
            ('"nested_offset"] = quantized.offset.item()', '"nested_offset"] = 0.0'),
            ("absmax = row_max(blocks.abs())", "absmax = blocks.amax(dim=1)"),
        ],
    ),
    "tests/reference/blockwise": (
        [
            "tests/properties/reference/test_nf4_bounds.py",
            "tests/properties/reference/test_nf4_bitsandbytes.py",
            "tests/properties/reference/test_nf4_cuda_rules.py",
        ],
        [
            ("* 0.5 * 65535 + 0.5)", "* 0.5 * 65535)"),
            ("(below % 2 == 1)", "(below % 2 == 0)"),
            ("codes = codes.masked_fill((absmax == 0)[:, None], 0)", "pass"),
            ("absmax.repeat_interleave(blocksize)", "absmax.repeat(blocksize)"),
            ("NESTED_BLOCKSIZE = 256", "NESTED_BLOCKSIZE = 128"),
        ],
    ),
    "tests/reference/codebook": (
        [
            "tests/properties/reference/test_nf4_invariants.py",
            "tests/properties/reference/test_nf4_bounds.py",
            "tests/properties/reference/test_nf4_bitsandbytes.py",
            "tests/properties/reference/test_nf4_cuda_rules.py",
        ],
        [
            ("0.07958029955625534", "0.0795804"),
            ("return (values[:-1] + values[1:]) / 2", "return values[1:]"),
            ("(10 ** (decade - 6))", "(10 ** (decade - 7))"),
            ("2.0 / 65535", "2.0 / 65536"),
            ("0.00260417, ", "0.0026041667, "),
        ],
    ),
    "finetune/model/experts": (
        ["tests/properties/model/test_qlora_refusals.py", "tests/properties/training/test_qlora_step.py"],
        [
            (".chunk(2, dim=-1)", ".chunk(2, dim=-1)[::-1]"),
            ("self.act_fn(gate) * up", "gate * up"),
            ("top_k_weights.flatten()[slots, None]", "top_k_weights.flatten()[0]"),
            ("if wrong:", "if False:"),
            ("quant_type=self.quant_type", 'quant_type="nf4"'),
        ],
    ),
}
