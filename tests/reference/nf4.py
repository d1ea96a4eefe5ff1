"""Reference codec for 4-bit blockwise quantization, NF4 and FP4, single and double: what bitsandbytes is held to.

Plain torch, no kernel. It equals bitsandbytes 0.50 on the CPU bit for bit wherever that is right. ``rules="cuda"``
follows the CUDA kernels' source instead; those are compiled with fast math, so a real GPU may take the reciprocal one
unit in the last place off (a value within that of a threshold may get the neighbouring code) and flushes subnormal
numbers to zero.

Source: https://arxiv.org/abs/2305.14314 (QLoRA), https://arxiv.org/abs/2110.02861 (blockwise 8-bit).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from reference.blockwise import NESTED_BLOCKSIZE, check_rules, quantize_blockwise, row_max
from reference.codebook import FP4_CUDA_PIVOTS, QuantType, Rules, codebook, dynamic_map, midpoints
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights that may share one scale."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST_SCALE = 1e-38
"""The CPU library divides by no less than this, so that an all-zero block does not divide by zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleState:
    """Second level of double quantization: how the 8-bit scales decode. Names are those of bitsandbytes' ``state2``."""

    absmax: Tensor
    """float32 [ceil(blocks / 256)]: largest magnitude of each 256 centred scales."""
    code: Tensor
    """float32 [256]: the 8-bit map."""
    blocksize: int = NESTED_BLOCKSIZE
    """Scales in one second-level block."""
    dtype: torch.dtype = torch.float32
    """Dtype of the decoded scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A quantized tensor. Every field but ``packed`` is named and meant as in bitsandbytes' ``QuantState``."""

    packed: Tensor
    """Two codes a byte, the first in the high half: uint8 [(n + 1) // 2, 1], or a bit view of that in another dtype."""
    absmax: Tensor
    """float32 [blocks]: largest magnitude of each block; with double quantization uint8 codes of it."""
    code: Tensor
    """float32 [16]: value of each code."""
    shape: torch.Size
    """Shape of the tensor that was quantized."""
    dtype: torch.dtype
    """Dtype of the tensor that was quantized, and of the decoded one."""
    quant_type: QuantType
    """"nf4" or "fp4"."""
    blocksize: int
    """Weights in one block, counted over the flat tensor."""
    offset: Tensor | None = None
    """float32 scalar: mean of the scales, taken off before they are quantized."""
    state2: ScaleState | None = None
    """Second level; None without double quantization."""

    @property
    def nested(self) -> bool:
        """Whether the scales are quantized too."""
        return self.state2 is not None


def quantize(
    tensor: Tensor,
    *,
    quant_type: QuantType = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
    rules: Rules = "cpu",
    storage: torch.dtype = torch.uint8,
) -> Quantized:
    """Quantize a tensor to 4 bits a value, block by block over its row-major flat order.

    Args:
        tensor: any shape, fp32, bf16 or fp16; read as fp32. bitsandbytes' domain is absmax in [2^-126, 2^126].
        quant_type: "nf4" or "fp4".
        blocksize: values that share one scale: 32, 64, ... 4096.
        double_quant: quantize the scales too, to 8 bits in blocks of 256 about their mean.
        rules: "cpu" or "cuda", where the two libraries differ: zero and partial blocks, NaN, FP4 thresholds, ties.
        storage: dtype of ``packed``; the bytes are the same.

    Returns:
        The codes and all that decoding needs.

    Raises:
        ValueError: for another dtype, type, blocksize or rules, or a storage dtype that does not divide the bytes.
    """
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"tensor.dtype = {tensor.dtype}: cannot be quantized to 4 bits; cast to fp32, bf16 or fp16 first"
        )
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize = {blocksize!r}: not supported; use one of {', '.join(map(str, BLOCKSIZES))}")
    check_rules(rules)
    table = codebook(quant_type)
    values = tensor.detach().reshape(-1).to("cpu", torch.float32)
    scaled, absmax = _scale_blocks(values, blocksize, rules)
    codes = encode(scaled, quant_type=quant_type, rules=rules)
    packed = pack(codes, spare=int(table.eq(0).nonzero()[0]), storage=storage)
    offset, state2 = None, None
    if double_quant:
        offset = absmax.mean()
        absmax, state2 = quantize_scales(absmax - offset, rules=rules)
    return Quantized(
        packed=packed,
        absmax=absmax,
        code=table,
        shape=tensor.shape,
        dtype=tensor.dtype,
        quant_type=quant_type,
        blocksize=blocksize,
        offset=offset,
        state2=state2,
    )


def dequantize(quantized: Quantized, *, dtype: torch.dtype | None = None) -> Tensor:
    """Decode: each code's value times its block's scale, in fp32, rounded once to the target dtype.

    Args:
        quantized: what `quantize` returned, or `from_state_dict` or `from_bitsandbytes` read.
        dtype: target dtype; the quantized tensor's own by default.

    Returns:
        The tensor's shape. (bitsandbytes' CPU code turns an even-length 1-D shape into (1, n); this does not.)
    """
    count = quantized.shape.numel()
    values = quantized.code[unpack(quantized.packed)[:count].long()]
    per_value = scales(quantized).repeat_interleave(quantized.blocksize)[:count]
    return (values * per_value).to(dtype or quantized.dtype).reshape(quantized.shape)


def scales(quantized: Quantized) -> Tensor:
    """Scale of each block, decoded if it is quantized itself.

    Returns:
        float32 [blocks]. With double quantization a small one among large ones may be far off, or negative.
    """
    state2 = quantized.state2
    if state2 is None or quantized.offset is None:
        return quantized.absmax
    per_scale = state2.absmax.repeat_interleave(state2.blocksize)[: quantized.absmax.numel()]
    return state2.code[quantized.absmax.long()] * per_scale + quantized.offset


def _scale_blocks(values: Tensor, blocksize: int, rules: Rules) -> tuple[Tensor, Tensor]:
    """Divide each block of a flat fp32 tensor by its largest magnitude: scaled values [n], magnitudes [blocks]."""
    count = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -count % blocksize)).view(-1, blocksize)
    if rules == "cuda":
        # fmaxf takes the number where one operand is NaN; the running maximum starts at the lowest float.
        numbers = blocks.abs().nan_to_num(nan=torch.finfo(torch.float32).min, posinf=math.inf)
        absmax = row_max(numbers)
        scaled = blocks * (1.0 / absmax)[:, None]  # an all-zero block is 0 * inf = NaN here, and encoded as that
        return scaled.reshape(-1)[:count], absmax
    absmax = row_max(blocks.abs())
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST_SCALE))[:, None]).clamp(-1, 1)
    if count % blocksize:
        # The trailing partial block is divided, not multiplied by the reciprocal, and its stored scale is clamped.
        absmax[-1] = absmax[-1].clamp(min=SMALLEST_SCALE)
        scaled[-1] = (blocks[-1] / absmax[-1]).clamp(-1, 1)
    return scaled.reshape(-1)[:count], absmax


def encode(scaled: Tensor, *, quant_type: QuantType, rules: Rules = "cpu") -> Tensor:
    """Nearest code of each value; on a threshold that of the lower value (FP4 on CUDA: the smaller magnitude).

    Args:
        scaled: float32 [n] in [-1, 1]. NaN gets the highest value's code on the CPU, code 0 on CUDA.
        quant_type: "nf4" or "fp4".
        rules: "cpu" or "cuda".

    Returns:
        uint8 [n] in 0..15.
    """
    if rules == "cuda" and quant_type == "fp4":
        magnitude = torch.searchsorted(torch.tensor(FP4_CUDA_PIVOTS), scaled.abs())
        ascending = codebook("fp4")[:8].argsort()
        codes = ascending[magnitude] + 8 * (scaled < 0)
    else:
        table = codebook(quant_type)
        order = torch.argsort(table)
        codes = order[torch.bucketize(scaled, midpoints(table[order]))]
    if rules == "cuda":
        codes = codes.masked_fill(scaled.isnan(), 0)
    return codes.to(torch.uint8)


def pack(codes: Tensor, *, spare: int = 7, storage: torch.dtype = torch.uint8) -> Tensor:
    """Two codes a byte, the first in the high half.

    Args:
        codes: uint8 [n] in 0..15.
        spare: code that an odd one out is paired with: that of zero, 7 in NF4 and 0 in FP4.
        storage: dtype to view the bytes as.

    Returns:
        [bytes / itemsize, 1] of ``storage``.

    Raises:
        ValueError: if the bytes do not fill whole elements of ``storage``.
    """
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_tensor([spare])])
    data = (codes[::2] << 4) | codes[1::2]
    if data.numel() % storage.itemsize:
        raise ValueError(
            f"storage = {storage}: {data.numel()} bytes are no whole number of its elements; use torch.uint8"
        )
    return data.view(storage).unsqueeze(1)


def unpack(packed: Tensor) -> Tensor:
    """Codes of a packed tensor of any dtype: uint8 [2 * bytes], the spare one of an odd count included."""
    data = packed.contiguous().view(torch.uint8).reshape(-1)
    return torch.stack([data >> 4, data & 0xF], dim=1).reshape(-1)


def quantize_scales(values: Tensor, *, rules: Rules = "cpu") -> tuple[Tensor, ScaleState]:
    """Quantize centred scales to 8 bits in blocks of 256, with the signed dynamic map."""
    codes, absmax = quantize_blockwise(values, blocksize=NESTED_BLOCKSIZE, rules=rules)
    return codes, ScaleState(absmax=absmax, code=dynamic_map())


def state_dict(quantized: Quantized, prefix: str = "weight") -> dict[str, Tensor]:
    """The keys and tensors that bitsandbytes saves for a 4-bit weight, the same bytes (what safetensors files hold)."""
    details: dict[str, Any] = {
        "quant_type": quantized.quant_type,
        "blocksize": quantized.blocksize,
        "dtype": _dtype_name(quantized.dtype),
        "shape": tuple(quantized.shape),
    }
    tensors = {
        prefix: quantized.packed,
        f"{prefix}.absmax": quantized.absmax,
        f"{prefix}.quant_map": quantized.code,
    }
    if quantized.state2 is not None and quantized.offset is not None:
        tensors[f"{prefix}.nested_absmax"] = quantized.state2.absmax
        tensors[f"{prefix}.nested_quant_map"] = quantized.state2.code
        details["nested_blocksize"] = quantized.state2.blocksize
        details["nested_dtype"] = _dtype_name(quantized.state2.dtype)
        details["nested_offset"] = quantized.offset.item()
    key = f"{prefix}.quant_state.bitsandbytes__{quantized.quant_type}"
    tensors[key] = torch.tensor(list(json.dumps(details).encode()), dtype=torch.uint8)
    return tensors


def from_state_dict(tensors: Mapping[str, Tensor], prefix: str = "weight") -> Quantized:
    """Read a 4-bit weight that `state_dict` or bitsandbytes saved.

    Raises:
        ValueError: if the mapping holds no 4-bit weight of that name.
    """
    keys = [key for key in tensors if key.startswith(f"{prefix}.quant_state.bitsandbytes__")]
    if prefix not in tensors or len(keys) != 1:
        held = ", ".join(sorted(tensors)) or "nothing"
        raise ValueError(f"prefix = {prefix!r}: no 4-bit weight of that name; the mapping holds {held}")
    details = json.loads(bytes(tensors[keys[0]].tolist()))
    nested = f"{prefix}.nested_absmax" in tensors
    state2 = None
    if nested:
        state2 = ScaleState(
            absmax=tensors[f"{prefix}.nested_absmax"],
            code=tensors[f"{prefix}.nested_quant_map"],
            blocksize=details["nested_blocksize"],
            dtype=getattr(torch, details["nested_dtype"]),
        )
    return Quantized(
        packed=tensors[prefix],
        absmax=tensors[f"{prefix}.absmax"],
        code=tensors[f"{prefix}.quant_map"],
        shape=torch.Size(details["shape"]),
        dtype=getattr(torch, details["dtype"]),
        quant_type=details["quant_type"],
        blocksize=details["blocksize"],
        offset=torch.tensor(details["nested_offset"]) if nested else None,
        state2=state2,
    )


def from_bitsandbytes(packed: Tensor, quant_state: Any) -> Quantized:
    """Wrap a weight that bitsandbytes quantized, without copying: ``from_bitsandbytes(p.data, p.quant_state)``."""
    second = quant_state.state2
    return Quantized(
        packed=packed,
        absmax=quant_state.absmax,
        code=quant_state.code,
        shape=torch.Size(quant_state.shape),
        dtype=quant_state.dtype,
        quant_type=quant_state.quant_type,
        blocksize=quant_state.blocksize,
        offset=quant_state.offset,
        state2=second
        and ScaleState(absmax=second.absmax, code=second.code, blocksize=second.blocksize, dtype=second.dtype),
    )


def storage_bytes(quantized: Quantized) -> int:
    """Bytes that a quantized tensor holds: codes, scales, both tables, and the offset."""
    tensors = [quantized.packed, quantized.absmax, quantized.code, quantized.offset]
    if quantized.state2 is not None:
        tensors += [quantized.state2.absmax, quantized.state2.code]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def bits_per_parameter(*, blocksize: int = 64, double_quant: bool = False) -> float:
    """Bits a weight costs, tables aside: 4.5 at blocks of 64, 4.127 with double quantization (QLoRA, section 3)."""
    scale_bits = 8 + 32 / NESTED_BLOCKSIZE if double_quant else 32.0
    return 4 + scale_bits / blocksize


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
