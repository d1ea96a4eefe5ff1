"""A weight that is stored in 4 bits and that any code may use as a tensor.

Some models hold their experts as one large parameter, and read it in a way of their own: one multiplies all experts at
once, another picks them one by one. :func:`pack` lets a module keep such parameters in 4 bits. Its code, which is not
changed, reads a :class:`PackedWeight` in place of each. That is a tensor without values. A view of it, such as one
expert or a transpose, is a :class:`PackedWeight` too, and whatever computes with it gets the decoded values of just
that view. Autograd keeps the :class:`PackedWeight` for the backward pass, in which it is decoded again, so that no
decoded weight stays in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from torch import nn
from torch.utils._pytree import tree_map

from finetune.errors import ModelError
from finetune.patches.bitsandbytes import Frame
from finetune.patches.transformers import put_in_front

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bitsandbytes.functional import QuantState

BLOCK = 64
"""Weights that share one scale."""
_SCALES = 256
"""Scales that share one scale, with double quantization."""
_GROUP = BLOCK * _SCALES
_PIECE = 2**30
"""Weights that are quantized at a time, because bitsandbytes counts them in 32 bits."""
_aten = torch.ops.aten
_VIEWS = {
    _aten.alias.default,
    _aten.detach.default,
    _aten.expand.default,
    _aten.permute.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.squeeze.dim,
    _aten.t.default,
    _aten.transpose.int,
    _aten.unbind.int,
    _aten.unsqueeze.default,
    _aten.view.default,
}
"""Operations whose result is a part of the weight, or the weight in another shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """All values of a weight, in the order in which they are in memory."""

    packed: torch.Tensor
    """[ceil(values / 2), 1] bytes."""
    state: QuantState

    def decoded(self, begin: int, end: int) -> torch.Tensor:
        """Return the values from ``begin`` to ``end``, [values]. ``begin`` is a multiple of :data:`_GROUP`."""
        state = self.state
        scales = state.absmax[begin // BLOCK : -(-end // BLOCK)]
        shared = None if state.state2 is None else state.state2.absmax[begin // _GROUP : -(-end // _GROUP)]
        part = replace(Frame.of(state), shape=torch.Size((end - begin,))).filled(scales, shared)
        values: torch.Tensor = bnb.functional.dequantize_4bit(self.packed[begin // 2 : -(-end // 2)], part)
        return values.view(-1)


class PackedWeight(torch.Tensor):
    """A frozen weight in 4 bits, or a view of one. It has the shape, strides and dtype of the decoded weight."""

    _stored: _Stored
    _place: torch.Tensor  # the view itself, of a tensor on the meta device that stands for all values

    @staticmethod
    def __new__(cls, stored: _Stored, place: torch.Tensor) -> PackedWeight:
        """Make the view ``place`` of what is stored. ``place`` is on the meta device."""
        made: PackedWeight = torch.Tensor._make_wrapper_subclass(
            cls,
            place.size(),
            strides=place.stride(),
            storage_offset=place.storage_offset(),
            dtype=place.dtype,
            device=stored.packed.device,
            requires_grad=False,
        )
        made._stored, made._place = stored, place
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch leaves out the first argument in its annotation
        cls, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation that was called with a packed weight.

        Raises:
            ModelError: the operation writes into the weight.
        """
        kwargs = kwargs or {}
        if function.overloadpacket.__name__.endswith("_") and isinstance(args[0], cls):
            raise ModelError(
                "precision: this model's code writes into the weights of its experts, which it cannot do where they "
                "are stored in 4 bits: use --precision bf16"
            )
        if function in _VIEWS:
            weight, *rest = args
            found = function(weight._place, *rest, **kwargs)
            return tree_map(lambda place: cls(weight._stored, place), found)
        decoded = tree_map(lambda value: value.decoded() if isinstance(value, cls) else value, (args, kwargs))
        return function(*decoded[0], **decoded[1])

    def decoded(self) -> torch.Tensor:
        """Return the values, in the shape and dtype of this view."""
        place = self._place
        if not place.numel():
            return torch.empty(place.shape, dtype=place.dtype, device=self._stored.packed.device)
        first = int(place.storage_offset())
        last = first + sum((size - 1) * stride for size, stride in zip(place.size(), place.stride(), strict=True))
        begin, end = first - first % _GROUP, last + BLOCK - last % BLOCK
        values = self._stored.decoded(begin, min(end, self._stored.state.shape.numel()))
        return values.as_strided(place.size(), place.stride(), first - begin)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch has no annotation
        """Return the text that ``print`` shows. It decodes nothing."""
        return f"PackedWeight({tuple(self.shape)}, {self._stored.state.quant_type}, {self.dtype})"


class _Packing:
    """What a module that keeps parameters in 4 bits has beside its own methods.

    Attributes:
        quant_states: what is needed to decode the bytes of each parameter; a list with one state.
    """

    quant_states: dict[str, list[QuantState]]

    def quantize(self, name: str, values: torch.Tensor) -> nn.Parameter:
        """Return the bytes of a parameter, [ceil(values / 2), 1], and keep what is needed to decode them.

        Args:
            name: the parameter's name.
            values: the parameter as the checkpoint has it, of any shape.
        """
        packed, state = quantized(values, **self._settings)  # type: ignore[attr-defined]  # set by `pack`
        self.quant_states[name] = [state]
        return nn.Parameter(packed, requires_grad=False)

    def dequantized(self, name: str) -> torch.Tensor:
        """Return a parameter's values, in the shape and dtype that they had when they were quantized."""
        weight: PackedWeight = getattr(self, name)
        return weight.decoded()


def pack(module: nn.Module, names: Sequence[str], *, quant_type: str, double_quant: bool) -> None:
    """Let a module keep parameters in 4 bits once they are read, and give its own code packed weights in their place.

    Args:
        module: gets the methods of :class:`_Packing`.
        names: the parameters.
        quant_type: ``nf4`` or ``fp4``.
        double_quant: whether the scales are quantized too.
    """
    put_in_front(module, _Packing, {name: property(_reader(name)) for name in names})
    own: Any = module
    own.quant_states = {}
    own._settings = {"quant_type": quant_type, "double_quant": double_quant}


def is_packed(module: nn.Module, name: str) -> bool:
    """Return whether a module keeps this parameter in 4 bits, or will when it is read."""
    return isinstance(module, _Packing) and isinstance(getattr(type(module), name, None), property)


def quantized(values: torch.Tensor, *, quant_type: str, double_quant: bool) -> tuple[torch.Tensor, QuantState]:
    """Quantize a tensor of any size, and return its bytes, [ceil(values / 2), 1], and what is needed to decode them."""
    flat = values.contiguous().view(-1)
    packed = torch.empty((len(flat) + 1) // 2, 1, dtype=torch.uint8, device=values.device)
    scales = []
    for begin in range(0, len(flat), _PIECE):
        piece, state = bnb.functional.quantize_4bit(
            flat[begin : begin + _PIECE], blocksize=BLOCK, compress_statistics=False, quant_type=quant_type
        )
        packed[begin // 2 : begin // 2 + len(piece)] = piece
        scales.append(state.absmax)
    offset = nested = None
    absmax = torch.cat(scales)
    if double_quant:
        offset = absmax.mean()
        absmax, nested = bnb.functional.quantize_blockwise(absmax - offset, blocksize=_SCALES)
    return packed, bnb.functional.QuantState(
        absmax=absmax,
        shape=values.shape,
        code=state.code,
        blocksize=BLOCK,
        quant_type=quant_type,
        dtype=values.dtype,
        offset=offset,
        state2=nested,
    )


def _reader(name: str) -> Any:
    def read(module: Any) -> Any:
        kept = module._parameters[name]
        states = module.quant_states.get(name)
        if states is None:  # not read yet: transformers compares the shape with that of the checkpoint
            return kept
        place = torch.empty(states[0].shape, dtype=states[0].dtype, device="meta")
        weight: Any = PackedWeight(_Stored(packed=kept.data, state=states[0]), place)
        weight._is_hf_initialized = True  # transformers would write random numbers into a weight without this
        return weight

    return read
