"""Patches of transformers: quantization, the gate of fused experts, GGUF models, the causal mask, sharded models.

Each docstring says when its patch may go; ``table.py`` has all of them with the version at which to look again.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from transformers import masking_utils, modeling_utils
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.utils import output_capturing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from torch import nn
    from transformers import PreTrainedModel


class FourBitLoading(Bnb4BitHfQuantizer):  # type: ignore[misc]  # transformers has no annotations
    """transformers' 4-bit quantizer with methods that run before and after it replaces the linear layers.

    The class may go when transformers quantizes fused experts to 4 bits itself; look again with 5.26.
    """

    def prepare(self, model: PreTrainedModel) -> None:
        """Do what has to be done before layers are replaced. The model has no weights yet."""

    def complete(self, model: PreTrainedModel, device_map: Any) -> None:
        """Do what has to be done after linear layers are replaced and before weights are read."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, device_map: Any, **kwargs: Any) -> None:
        self.prepare(model)
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        self.complete(model, device_map)


class EightBitLoading(Bnb8BitHfQuantizer):  # type: ignore[misc]  # transformers has no annotations
    """transformers' 8-bit quantizer with a method that runs before it replaces the linear layers.

    The class may go when transformers calls a public method at that moment; look again with 5.26.
    """

    def prepare(self, model: PreTrainedModel) -> None:
        """Do what has to be done before layers are replaced. The model has no weights yet."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, device_map: Any, **kwargs: Any) -> None:
        self.prepare(model)
        super()._process_model_before_weight_loading(model, device_map, **kwargs)


def apply_gate(source: Any, experts: nn.Module, value: torch.Tensor) -> torch.Tensor:
    """Apply the gate of a class of fused experts to the product of the first matrix.

    The function may go when transformers gives the gate a public name; look again with 5.26.

    Args:
        source: the class that transformers declares, whose gate is used.
        experts: the module that holds the attributes which the gate reads.
        value: [tokens, outputs of the first matrix].

    Returns:
        [tokens, inputs of the second matrix].
    """
    gated: torch.Tensor = source._apply_gate(experts, value)
    return gated


def put_in_front(experts: nn.Module, methods: type, attributes: dict[str, property]) -> None:
    """Give experts a class of the same name, with more methods and attributes than their own code has.

    Their code stays as it is and finds the attributes in place of its parameters. The function may go when transformers
    quantizes experts of every form to 4 bits; look again with 5.26.
    """
    kind = type(experts)
    body: dict[str, Any] = {**attributes, "__module__": kind.__module__}
    experts.__class__ = type(kind.__name__, (methods, kind), body)


def is_expert_parallel(experts: nn.Module) -> bool:
    """Return whether transformers has spread these experts over several devices.

    The function may go together with :func:`apply_gate`.
    """
    return bool(getattr(experts, "_is_expert_parallel", False))


def keep_scale(model: nn.Module) -> None:
    """Let an RWKV model compute with the same weights in evaluation mode as in training.

    In evaluation mode it divides weights by powers of two, which only fp16 needs. With 4 bits it would quantize them
    once more, as FP4, and would fail where a layer has an adapter. The patch may go when it leaves layers with an
    adapter, and the type of their weights, as they are; look again with 5.26.
    """
    decoders: Iterator[Any] = model.modules()
    for decoder in decoders:
        if hasattr(decoder, "_rescale_layers"):
            decoder._rescale_layers = lambda: None


def forget_quantization(model: Any) -> None:
    """Make a model that was read from a GGUF file an ordinary one, so that it can be saved.

    transformers has decoded its values, but still counts it as quantized and refuses to save it. The patch may go when
    ``save_pretrained`` writes a model that was loaded with ``gguf_file``; look again with 5.26.
    """
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


@contextlib.contextmanager
def known_to_be_apart(position_ids: torch.Tensor | None) -> Iterator[None]:
    """Keep transformers from looking for packed rows in a batch without positions, inside the ``with`` block.

    Without positions, transformers makes them itself on the device, looks in them for rows that are packed, and waits
    for the answer. The patch may go when it does not look for packed rows in positions of its own; look again with
    5.26.

    Args:
        position_ids: the positions that the model is given. Packed rows have positions that restart; for such a batch
            nothing is changed.
    """
    own = getattr(masking_utils, "find_packed_sequence_indices", None)
    if own is None or position_ids is not None:
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = own


@contextlib.contextmanager
def checkpointed_through(layers: Sequence[nn.Module], around: Callable[[Any], Any]) -> Iterator[None]:
    """Let layers that recompute call ``around(checkpoint)`` in place of ``checkpoint``, inside the ``with`` block.

    transformers gives each of them the function of checkpointing as an attribute. The patch may go when
    ``gradient_checkpointing_enable`` takes such a function; look again with 5.26.
    """
    before = [layer._gradient_checkpointing_func for layer in layers]
    for layer, own in zip(layers, before, strict=True):
        layer._gradient_checkpointing_func = around(own)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer._gradient_checkpointing_func = own


@contextlib.contextmanager
def unwarmed() -> Iterator[None]:
    """Load a model inside the block without a large allocation beforehand, which leaves the card's memory reserved.

    Before it loads, transformers allocates what the whole model takes, up to 1.2 GiB less than the card has, and frees
    it, so that loading is faster. A rank that keeps a part of the model needs less, and NCCL cannot use what PyTorch's
    allocator has reserved. May go when transformers asks its quantizer how much stays on the card, or has a setting
    that turns this off; look again with 5.26.
    """
    before = modeling_utils.caching_allocator_warmup
    modeling_utils.caching_allocator_warmup = lambda *_, **__: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = before


def record_as_before(decoder: Any) -> None:
    """Let a decoder whose class FSDP has replaced return its routers' logits, as it did before.

    transformers looks for what a model can return under the name of its class. May go when it looks at the class's own
    ``_can_record_outputs``; look again with 5.26.
    """
    output_capturing._CAN_RECORD_REGISTRY[decoder] = decoder._can_record_outputs
