"""Runs the update of :mod:`finetune.training.adamw` as one Triton kernel over many parameters.

A launch gets a table of addresses in place of tensors, so that all parameters of one dtype share a launch, whatever
their shapes. Each block of the grid searches the table for the parameter that it works on. The addresses may be in
managed memory, which a card reads and writes like its own.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.training.adamw import Coefficients, Updated

_BLOCK = 1024


@triton.jit
def _rounded_bf16(master):
    """Return the 16 bits of the nearest bf16, as int32. Ties are rounded to even."""
    bits = master.to(tl.int32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(master == master, nearest, 0x7FC0)


@triton.jit
def _place(address, at, dtype: tl.constexpr, aligned: tl.constexpr):
    """Return pointers to the elements ``at`` of the tensor at an address."""
    pointer = address.to(tl.pointer_type(dtype))
    if aligned:  # so that loads and stores use the widest instructions of the card
        pointer = tl.multiple_of(pointer, 16)
    return pointer + at


@triton.jit
def _adamw(
    table,  # int64 [7, count]: first block, size, addresses of weight, gradient, moments, dropped bits
    count,  # parameters
    beta1,  # fp32 from here on
    rest1,
    beta2,
    rest2,
    eps,
    rate,
    shrink,
    dtype: tl.constexpr,  # of the weights and the gradients
    bf16: tl.constexpr,
    masters: tl.constexpr,
    shrinks: tl.constexpr,
    aligned: tl.constexpr,  # all addresses and sizes are multiples of 16
    halvings: tl.constexpr,  # steps of the binary search: 2 ** halvings >= count
    block_size: tl.constexpr,
):
    block = tl.program_id(0)
    owner, beyond = 0, count
    for _ in tl.static_range(halvings):
        middle = (owner + beyond) // 2
        later = tl.load(table + middle) <= block
        owner, beyond = tl.where(later, middle, owner), tl.where(later, beyond, middle)
    row = table + owner
    size = tl.load(row + count)
    weight_at, gradient_at = tl.load(row + 2 * count), tl.load(row + 3 * count)
    first_at, second_at = tl.load(row + 4 * count), tl.load(row + 5 * count)
    if aligned:
        size = tl.multiple_of(size, 16)
    at = (block - tl.load(row)) * block_size + tl.arange(0, block_size)  # int64, as in the table
    here = at < size
    first_at = _place(first_at, at, tl.float32, aligned)
    second_at = _place(second_at, at, tl.float32, aligned)
    if bf16:  # the bits are converted, which is exact on every card, with bf16 arithmetic or without
        weight_at = _place(weight_at, at, tl.int16, aligned)
        gradient_at = _place(gradient_at, at, tl.int16, aligned)
        gradient = (tl.load(gradient_at, mask=here, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        bits = tl.load(weight_at, mask=here, other=0).to(tl.int32) << 16
        if masters:
            dropped_at = _place(tl.load(row + 6 * count), at, tl.int16, aligned)
            bits += tl.load(dropped_at, mask=here, other=0).to(tl.int32)
        master = bits.to(tl.float32, bitcast=True)
    else:
        weight_at = _place(weight_at, at, dtype, aligned)
        gradient = tl.load(_place(gradient_at, at, dtype, aligned), mask=here, other=0.0).to(tl.float32)
        master = tl.load(weight_at, mask=here, other=0.0).to(tl.float32)
    if shrinks:
        master = master * shrink
    first = tl.load(first_at, mask=here, other=0.0) * beta1 + gradient * rest1
    second = tl.load(second_at, mask=here, other=0.0) * beta2 + gradient * rest2 * gradient
    change = tl.div_rn(first, tl.sqrt_rn(second) + eps)
    master = master + change * rate
    tl.store(first_at, first, mask=here)
    tl.store(second_at, second, mask=here)
    if bf16:
        nearest = _rounded_bf16(master)
        if masters:  # a tie is rounded up, with the remainder -32,768: see finetune.training.masters
            bits = master.to(tl.int32, bitcast=True)
            left = bits - (nearest << 16)
            nearest += (left == 32768).to(tl.int32)
            tl.store(dropped_at, left.to(tl.int16), mask=here)
        tl.store(weight_at, nearest.to(tl.int16), mask=here)
    else:
        tl.store(weight_at, master.to(dtype), mask=here)


_DTYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def update_in_one_launch(parameters: Sequence[Updated], numbers: Coefficients) -> None:
    """Update ``parameters`` in place, on the current stream, in one launch for each dtype.

    Parameters with masters and parameters without them take separate launches. The function does not wait for the card.
    It copies only the table there, 56 bytes for each parameter.
    """
    kinds: dict[tuple[torch.dtype, bool], list[Updated]] = {}
    for parameter in parameters:
        if parameter.weight.numel():
            kinds.setdefault((parameter.weight.dtype, parameter.dropped is not None), []).append(parameter)
    for (dtype, masters), chosen in kinds.items():
        rows, blocks = [], 0
        for of in chosen:
            tensors = (of.weight, of.gradient, of.first, of.second, of.dropped)
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
            rows.append([blocks, of.weight.numel(), *addresses])
            blocks += -(-of.weight.numel() // _BLOCK)
        _adamw[(blocks,)](
            _on_device(rows, chosen[0].weight.device),
            len(chosen),
            numbers.beta1,
            numbers.rest1,
            numbers.beta2,
            numbers.rest2,
            numbers.eps,
            numbers.rate,
            numbers.shrink,
            dtype=_DTYPES[dtype],
            bf16=dtype == torch.bfloat16,
            masters=masters,
            shrinks=numbers.shrink != 1.0,
            aligned=not any(number % 16 for row in rows for number in row[1:]),
            halvings=(len(chosen) - 1).bit_length(),
            block_size=_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,  # a fused multiply-add rounds once where torch rounds twice
        )


def _on_device(rows: list[list[int]], device: torch.device) -> torch.Tensor:
    """Copy the table to the device without waiting. PyTorch keeps the pinned memory until the copy is done."""
    table = torch.tensor(rows).T.contiguous()
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)
