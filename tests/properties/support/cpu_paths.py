"""Which code bitsandbytes and torch run on this processor: what the tests expect differs by it.

Each asks the library itself. ``ATEN_CPU_CAPABILITY=avx2`` turns torch's AVX-512 code off, and with it the detour that
bitsandbytes takes for large blocks; the decoder in bitsandbytes' own library asks the processor alone.
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.cextension import lib

from finetune.model import experts

AVX512 = bool(lib.has_avx512f_cpu())
"""bitsandbytes' library decodes 4 bits with AVX-512 instructions."""

AVX512_BF16 = bool(bnb.has_avx512bf16())
"""It rounds to bf16 with the processor's own instruction, and repacks weights in evaluation mode."""

TORCH_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""torch computes with AVX-512 instructions. bitsandbytes then decodes blocks of 2,048 and more in Python."""


def decoded_wrongly(shape: torch.Size, blocksize: int) -> bool:
    """Whether bitsandbytes decodes a matrix of this shape with wrong scales on this processor."""
    if AVX512 and not TORCH_AVX512 and blocksize >= 2048:  # no detour around the decoder
        return shape.numel() > shape[-1] and shape[-1] % 16 == 0 and shape[-1] % blocksize != 0
    return AVX512 and experts.decoded_wrongly(shape, blocksize=blocksize)
