"""Attention that keeps packed rows apart, in memory that is proportional to the tokens and not to their square.

On a card, PyTorch's attention for rows of different lengths computes all rows in one kernel where it computes exactly
what the model's own attention does. Everywhere else each row runs through the model's own attention by itself, which is
exact for every kind of attention.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from finetune.model.checks import why_rows_mix
from finetune.model.forward import base_model
from finetune.model.packed_rows import ROWS_ATTRIBUTE, RowsMask, Way, current_rows
from finetune.patches.attention import attention_name, window_of, wrap_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

_LARGEST_HEAD = 256
"""Values of a head that flash attention takes at most."""
_FIRST_CAPABILITY = (8, 0)
"""The compute capability that PyTorch's flash attention needs."""


def keep_rows_apart(model: nn.Module) -> str:
    """Choose how a model learns which tokens of a packed sequence share a row, and store the choice in the model.

    The way that needs the least memory is tried first, with a few tokens. A mask of every pair of tokens is the last.

    Args:
        model: the loaded model, with or without adapter, with its kernels set.

    Returns:
        A sentence that says what was chosen.
    """
    base: Any = base_model(model)
    kind = base.config.model_type
    way: Way = "mask"
    if "flash" in attention_name(base):
        way = "lengths"
    elif wrap_attention(base, _attend, _mask):
        way = "rows"
    setattr(base, ROWS_ATTRIBUTE, way)
    if way != "mask" and why_rows_mix(model) is not None:
        way = "mask"
        setattr(base, ROWS_ATTRIBUTE, way)
    if way == "mask":
        return (
            f"packed rows of this {kind} model are kept apart by a mask, whose size is the square of --seq: its "
            "attention cannot be told where rows begin"
        )
    if way == "lengths":
        return f"packed rows attend by themselves, in {attention_name(base)}"
    why = _why_not_one_kernel(base)
    if why is None:
        return "packed rows attend by themselves, all in one kernel (varlen_attn)"
    return f"packed rows attend by themselves, one after the other: {why}"


def _why_not_one_kernel(base: Any) -> str | None:
    """Return why this model's rows do not attend in one kernel, as far as that is known before a step."""
    device = next(base.parameters()).device
    if attention_name(base) != "sdpa":
        return f"this {base.config.model_type} model computes {attention_name(base)} attention"
    return _why_not_here(device, base.get_input_embeddings().weight.dtype)


@functools.cache
def _why_not_here(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "there is no GPU"
    if _varlen() is None:
        return "this PyTorch has no varlen_attn (2.10 and later have it)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"varlen_attn does not compute in {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < _FIRST_CAPABILITY:
        return "varlen_attn needs a card of compute capability 8.0 or later"
    return None


@functools.cache
def _varlen() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    import inspect

    known = inspect.signature(varlen.varlen_attn).parameters
    found: Callable[..., Any] | None = varlen.varlen_attn
    return found if {"window_size", "enable_gqa", "scale"} <= set(known) else None


def _mask(make: Callable[..., Any], *arguments: Any, **given: Any) -> Any:
    """Make a mask as transformers does, or a :class:`RowsMask` where the running batch has packed rows."""
    rows = current_rows()
    if rows is None:
        return make(*arguments, **given)
    if arguments or given.get("use_vmap") or not given.get("allow_is_causal_skip", True):
        raise TypeError("the model's mask depends on more than the positions of two tokens")

    def of_one(length: int) -> Any:
        alone = {"batch_size": 1, "q_length": length, "kv_length": length, "q_offset": 0, "kv_offset": 0}
        return make(**given | alone | {"attention_mask": None})

    return RowsMask(rows=rows, window=window_of(given["mask_function"], given.get("local_size")), of_one=of_one)


def _attend(
    attend: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **given: Any,
) -> tuple[Tensor, Any]:
    """Attend as a function of transformers does, and keep rows apart where the mask is a :class:`RowsMask`.

    The names of the arguments are those of transformers, because some models give them by name.

    Args:
        attend: the function of transformers.
        module: the model's attention layer.
        query: [b, heads, t, d]
        key: [b, heads of keys, t, d]
        value: [b, heads of keys, t, d of values]
        attention_mask: what the model hands to its layers.
        given: the function's further arguments.

    Returns:
        [b, t, heads, d of values], and the weights of attention or None.
    """
    mask = attention_mask
    if not isinstance(mask, RowsMask):
        return attend(module, query, key, value, mask, **given)  # type: ignore[no-any-return]  # a function of transformers
    length = query.shape[2]
    for name, tensor in given.items():
        if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and length in tensor.shape and name != "position_ids":
            raise TypeError(f"{name} has a value for each token, and is not cut into rows")
    if _in_one_kernel(attend, module, query, key, mask, given):
        return _all_at_once(query, key, value, mask, given.get("scaling")), None
    return _one_by_one(attend, module, (query, key, value), mask, given), None


def _in_one_kernel(
    attend: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, mask: RowsMask, given: dict[str, Any]
) -> bool:
    """Return whether ``varlen_attn`` computes exactly what the model's own attention does."""
    if getattr(attend, "__name__", "") != "sdpa_attention_forward" or mask.window is None:
        return False
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    more = any(given.get(name) is not None for name in ("softcap", "position_bias")) or given.get("dropout", 0.0) > 0
    return causal and not more and query.shape[-1] <= _LARGEST_HEAD and _why_not_here(query.device, query.dtype) is None


def _all_at_once(query: Tensor, key: Tensor, value: Tensor, mask: RowsMask, scale: float | None) -> Tensor:
    """Attend in every row at once, in memory that grows with the tokens."""
    attend = _varlen()
    assert attend is not None
    rows = mask.rows
    batch, heads, length, size = query.shape
    narrower = size - value.shape[-1]  # flash attention needs one size for both; the added zeros change no other value
    if narrower:
        value = F.pad(value, (0, narrower))
    flat = [tensor.transpose(1, 2).reshape(batch * length, tensor.shape[1], size) for tensor in (query, key, value)]
    window = mask.window if mask.window is not None and mask.window[0] < rows.longest - 1 else (-1, 0)
    bounds, longest = rows.bounds, rows.longest
    out = attend(
        *flat, bounds, bounds, longest, longest, scale=scale, window_size=window, enable_gqa=heads != key.shape[1]
    )
    out = out.view(batch, length, heads, size)
    return out[..., :-narrower] if narrower else out  # type: ignore[no-any-return]  # of torch


def _one_by_one(
    attend: Callable[..., Any],
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: RowsMask,
    given: dict[str, Any],
) -> Tensor:
    """Attend in one row after the other, as the model does if each row has a sequence to itself."""
    batch, _, length, _ = tensors[0].shape
    found, begin = [], 0
    for size in mask.rows.lengths:
        line, place = divmod(begin, length)
        parts = [tensor[line : line + 1, :, place : place + size] for tensor in tensors]
        found.append(attend(module, *parts, mask.of_one(size), **given)[0])
        begin += size
    return torch.cat(found, dim=1).view(batch, length, *found[0].shape[2:])
