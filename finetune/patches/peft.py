"""Patches of peft: DoRA with fp32 magnitudes, int8 weights decoded with their scales, and layers adapted as named.

A DoRA magnitude is about 1. In bf16 the next number is up to 0.8% away, and a step of AdamW changes a magnitude by
about the learning rate. The rounding removes the whole step: at the default rate no magnitude ever changes. Each
docstring says when its patch may go; ``table.py`` has all of them with the version at which to look again.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@contextlib.contextmanager
def as_named() -> Iterator[None]:
    """Make peft adapt the layers that are named and no others, inside the ``with`` block.

    peft 0.21 takes ``gate_proj``, ``up_proj`` and ``down_proj`` of some thirty mixtures for experts as transformers 4
    stored them. It then adapts the fused parameters of transformers 5, and silently leaves dense layers and shared
    experts of the same names without an adapter. The patch may go when peft looks at the model before it rewrites a
    name; look again with 0.23.
    """
    try:
        conversion: Any = importlib.import_module("peft.utils.transformers_weight_conversion")
    except ImportError:  # peft 0.18, the oldest that is supported, rewrites nothing
        yield
        return
    rewrites = {
        "convert_peft_config_for_transformers": lambda *_, **__: None,
        "convert_peft_adapter_state_dict_for_transformers": lambda adapter_state_dict, **_: adapter_state_dict,
    }
    kept = {name: getattr(conversion, name) for name in rewrites if hasattr(conversion, name)}
    try:
        for name in kept:
            setattr(conversion, name, rewrites[name])
        yield
    finally:
        for name, own in kept.items():
            setattr(conversion, name, own)


class PreciseDora(DoraLinearLayer):  # type: ignore[misc]  # peft has no annotations
    """Computes ``y = m / |W + s B A| * (W + s B A) x`` (https://arxiv.org/abs/2402.09353, equation 5).

    The norms are those of the rows. Magnitudes, norms and their quotient are fp32; tensors as large as the activations
    have the activations' dtype. peft also multiplies an identity matrix to get ``B A``; this class does not.
    """

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: Any,  # noqa: N803 - peft's names
        lora_B: Any,  # noqa: N803 - peft's names
        scaling: float,
        base_layer: Any,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """Compute what DoRA adds to the base layer's output.

        Args:
            x: [..., in] after dropout.
            lora_A: of weight A [rank, in].
            lora_B: of weight B [out, rank].
            scaling: s.
            base_layer: of weight W [out, in], quantized or not.
            base_result: [..., out], ``W x`` plus the bias. None when dropout has changed ``x``: the base layer then
                computes its output for the changed ``x`` (peft multiplies by the dense weight instead, and keeps that
                weight for backward).
            adapter_name: not used, because each adapter has a layer of its own.

        Returns:
            [..., out], in the dtype of ``base_result``.
        """
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            weight = self._by_rows(dense_weight(base_layer)).to(lora_A.weight.dtype)
            norms = _row_norms(torch.addmm(weight, lora_B.weight, lora_A.weight, alpha=scaling))
        quotient = self.weight / norms
        if base_result is None:
            stored = base_layer.weight
            base_result = base_layer(x.to(stored.dtype) if stored.is_floating_point() else x)
        if base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        update: Tensor = lora_B(lora_A(x))
        turned: Tensor = (quotient - 1).to(base_result.dtype) * base_result
        return turned.add((quotient * scaling).to(update.dtype) * update)

    def _by_rows(self, weight: Tensor) -> Tensor:
        return weight.T if self.fan_in_fan_out else weight


def make_precise(model: Any) -> None:
    """Give every DoRA layer of a peft model fp32 magnitudes and the forward pass of :class:`PreciseDora`, in place.

    It works on new and on loaded adapters. The patch may go when peft keeps magnitudes and norms in fp32 beside a
    16-bit adapter; look again with 0.23.
    """
    for module in model.modules():
        stored: Any = getattr(module, "weight", None)
        if type(stored).__name__ == "Int8Params" and stored.SCB is None:
            # peft has decoded this weight and lost its scales, see dense_weight. The layer's state still has them.
            stored.CB = None
        for layer in getattr(module, "lora_magnitude_vector", {}).values():
            layer.__class__ = PreciseDora
            layer.weight.data = layer.weight.data.to(torch.promote_types(layer.weight.dtype, torch.float32))


def start_magnitudes(model: Any) -> None:
    """Set every magnitude to the norm of its row, so that the adapted model starts with the base's outputs."""
    for module in model.modules():
        for name, layer in getattr(module, "lora_magnitude_vector", {}).items():
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            weight = layer._by_rows(dense_weight(module.get_base_layer())).to(a.dtype)
            with torch.no_grad():
                layer.weight.copy_(_row_norms(torch.addmm(weight, b, a, alpha=module.scaling[name])))


def dense_weight(layer: Any) -> Tensor:
    """Return a layer's weight, decoded if it is quantized.

    peft's own decoder loses the scales of an int8 weight on a CPU. The patch may go when peft decodes such a weight to
    the values that the layer computes with; look again with 0.23.
    """
    if type(layer.weight).__name__ != "Int8Params":
        decoded: Tensor = dequantize_module_weight(layer)
        return decoded
    import bitsandbytes.functional as bnb

    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    found: Tensor = bnb.int8_vectorwise_dequant(layer.weight.data, scales)
    return found


def _row_norms(weight: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
    return norms
