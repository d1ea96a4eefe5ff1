"""The tensors that bitsandbytes keeps beside a quantized weight: scales, code books and offsets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


def quantization_constants(weight: Any) -> Iterator[Tensor]:
    """Yield the tensors that are needed to decode a weight of bitsandbytes; none for an ordinary tensor.

    A tensor that several weights share, such as a code book, is yielded once for each of them.

    Args:
        weight: a 4-bit weight, which has a ``quant_state``; an 8-bit weight, or the state of an 8-bit layer, which have
            scales in ``SCB``; a ``QuantState`` itself; or anything else.
    """
    import torch

    state = getattr(weight, "quant_state", weight)
    # Under double quantization the scales have a state of their own. A state of another library, which has no scales by
    # this name, is not looked into: it may answer to every name.
    while isinstance(getattr(state, "absmax", None), torch.Tensor):
        for name in ("absmax", "code", "offset"):
            tensor = getattr(state, name, None)
            if isinstance(tensor, torch.Tensor):
                yield tensor
        state = getattr(state, "state2", None)
    scales = getattr(weight, "SCB", None)
    if isinstance(scales, torch.Tensor):
        yield scales
