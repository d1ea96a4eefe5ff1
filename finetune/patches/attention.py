"""The patch that lets packed rows through to the attention functions of transformers.

transformers has a table of attention functions and one of functions that make masks, both under the names that
``attn_implementation`` takes. Another name would change what models do that look at it: the sparse attention of
DeepSeek-V3.2 and of its kin would be left out. So the functions behind the names ``sdpa`` and ``eager`` are wrapped.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import torch
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    Wrapper = Callable[..., Any]
    """Takes the wrapped function and its arguments."""


def attention_name(model: PreTrainedModel) -> str:
    """Return the name of the model's attention implementation. transformers has no public name for that."""
    return str(model.config.get_text_config()._attn_implementation)


def wrap_attention(model: PreTrainedModel, attend: Wrapper, mask: Wrapper) -> bool:
    """Wrap the attention function of a model, and the function that makes its masks, in this process.

    A second call with the same wrappers changes nothing. ``sdpa`` is one function for all models. ``eager`` is wrapped
    in the module of the model's own code. The patch may go when attention functions of transformers are told where
    packed rows begin, whatever the implementation; look again with 5.26.

    Args:
        model: the model.
        attend: is called with the attention function and the function's arguments.
        mask: is called with the function that makes masks and the function's arguments.

    Returns:
        Whether the model has functions that can be wrapped.
    """
    name = attention_name(model)
    code = sys.modules[type(model).__module__]
    if name == "sdpa":
        if not _is_wrapped(ALL_ATTENTION_FUNCTIONS[name]):
            ALL_ATTENTION_FUNCTIONS[name] = _wrapped(attend, ALL_ATTENTION_FUNCTIONS[name])
    elif name == "eager" and hasattr(code, "eager_attention_forward"):
        if not _is_wrapped(code.eager_attention_forward):
            vars(code)["eager_attention_forward"] = _wrapped(attend, code.eager_attention_forward)
    else:
        return False
    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    if not _is_wrapped(masks[name]):
        masks[name] = _wrapped(mask, masks[name])
    return True


def window_of(mask_function: Callable[..., Any], size: int | None) -> tuple[int, int] | None:
    """Return how many tokens before and after itself a token sees under a mask function of transformers.

    The function is a closure, so it is asked about the pairs of tokens at which windows begin and end.

    Args:
        mask_function: takes numbers of batch, head, query and key, as tensors.
        size: the size that transformers gives beside the function: tokens of a window or of a chunk.

    Returns:
        ``(-1, 0)`` for all tokens before it and itself, ``(size - 1, 0)`` for a window that ends with the token, and
        None for any other mask.
    """
    if mask_function is masking_utils.causal_mask_function:
        return (-1, 0)
    if size is None:
        return None
    queries = torch.tensor([0, 1, size - 1, size, size + 1, 2 * size, 3 * size + 1])[:, None]
    steps = torch.tensor([0, 1, 2, size - 1, size, size + 1, -1])
    keys = (queries - steps).clamp(min=0)
    zero = torch.tensor(0)
    seen = mask_function(zero, zero, queries, keys)
    expected = (keys <= queries) & (keys > queries - size)
    return (size - 1, 0) if torch.equal(seen, expected) else None


def _wrapped(wrapper: Wrapper, function: Callable[..., Any]) -> Callable[..., Any]:
    made = functools.partial(wrapper, function)
    made.__dict__["finetune_wraps"] = function
    return made


def _is_wrapped(function: Callable[..., Any]) -> bool:
    return hasattr(function, "finetune_wraps")
