"""DoRA with magnitudes in fp32 beside a 16-bit adapter, and without the identity matrix that peft multiplies out.

A magnitude lies about 1. In bf16 the next number is up to 0.8% away, so that a step of AdamW, which moves it by about
the learning rate, is rounded away as a whole: at the default rate no magnitude moves, in any number of steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight

if TYPE_CHECKING:
    from torch import Tensor


class PreciseDora(DoraLinearLayer):  # type: ignore[misc]
    """``y = m / |W + s B A| * (W + s B A) x`` (https://arxiv.org/abs/2402.09353, equation 5), the norms row by row.

    Magnitudes, norms and their quotient are fp32; what is as large as the activations has their dtype.
    """

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: Any,  # noqa: N803 - peft's names
        lora_B: Any,  # noqa: N803
        scaling: float,
        base_layer: Any,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """What DoRA adds to the base layer's output.

        Args:
            x: [..., in] after dropout.
            lora_A: of weight A [rank, in].
            lora_B: of weight B [out, rank].
            scaling: s.
            base_layer: of weight W [out, in], quantized or not.
            base_result: [..., out], ``W x`` and the bias; None where dropout has made ``x`` another than the base saw,
                which is asked again then (peft multiplies by the dense weight, and keeps that for backward).
            adapter_name: not used: one adapter has one layer of this kind.
        """
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            weight = self._by_rows(_dense(base_layer)).to(lora_A.weight.dtype)
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
    """Give every DoRA layer of a peft model, made or loaded, fp32 magnitudes and the forward pass above, in place."""
    for module in model.modules():
        stored: Any = getattr(module, "weight", None)
        if type(stored).__name__ == "Int8Params" and stored.SCB is None:
            stored.CB = None  # peft has decoded it, see _dense: what the layer keeps in its state is in force
        for layer in getattr(module, "lora_magnitude_vector", {}).values():
            layer.__class__ = PreciseDora
            layer.weight.data = layer.weight.data.to(torch.promote_types(layer.weight.dtype, torch.float32))


def start_magnitudes(model: Any) -> None:
    """Set every magnitude to its row's norm, so that the first output is the base's."""
    for module in model.modules():
        for name, layer in getattr(module, "lora_magnitude_vector", {}).items():
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            weight = layer._by_rows(_dense(module.get_base_layer())).to(a.dtype)
            with torch.no_grad():
                layer.weight.copy_(_row_norms(torch.addmm(weight, b, a, alpha=module.scaling[name])))


def _dense(layer: Any) -> Tensor:
    """The layer's weight, decoded. peft's own decoder loses an int8 weight's scales on a CPU."""
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
