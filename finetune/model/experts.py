"""4-bit quantization of a whole model, mixture-of-experts layers included, for the loading code of transformers.

transformers keeps a layer's experts as one 3-D parameter and quantizes ``nn.Linear`` alone, so a "4-bit" Mixtral-8x7B
keeps 45 of its 47 billion parameters in half precision. The quantizer here puts a module of its own in the experts'
place before the weights arrive; each layer's experts are quantized as they are read, and one expert at a time is
dequantized to compute.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from finetune.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel
    from transformers.core_model_loading import ConversionOps

METHOD = "finetune_4bit"
BLOCK = 64
_WEIGHTS = ("gate_up_proj", "down_proj")


@register_quantization_config(METHOD)
class FourBitConfig(BitsAndBytesConfig):  # type: ignore[misc]
    """bitsandbytes' 4-bit settings, for linear layers and fused experts alike."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(load_in_4bit=True, **settings)
        self.quant_method = METHOD


@register_quantizer(METHOD)
class FourBitQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """Quantizes linear layers as transformers does, and fused experts too."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, device_map: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        _refuse_misread_layers(model, device_map)
        for name, module in list(_fused_experts(model)):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, QuantizedExperts(name, module, self.quantization_config))

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is stored in 4 bits."""
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, QuantizedExperts):
            return name in _WEIGHTS
        return bool(super().param_needs_quantization(model, param_name, **kwargs))

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that turns a weight as read into a weight as stored."""
        return _Quantize(self)


class _Quantize(Bnb4bitQuantize):  # type: ignore[misc]
    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, torch.Tensor]:
        model = kwargs["model"]
        result: dict[str, torch.Tensor] = {}
        for name in list(input_dict):
            module, weight = get_module_from_name(model, name)
            if isinstance(module, QuantizedExperts):
                value = input_dict.pop(name)
                result[name] = module.quantize(weight, value[0] if isinstance(value, list) else value)
        return result | (super().convert(input_dict, **kwargs) if input_dict else {})


class QuantizedExperts(nn.Module):
    """A layer's experts in 4 bits: ``down(act(gate(x)) * up(x))`` for each token's chosen experts, weighted and summed.

    Attributes:
        gate_up_proj: [experts, bytes] packed weights of each expert's [2 * intermediate, hidden] matrix.
        down_proj: [experts, bytes] packed weights of each expert's [hidden, intermediate] matrix.
    """

    def __init__(self, name: str, source: Any, config: FourBitConfig) -> None:
        super().__init__()
        self.act_fn = source.act_fn
        self.num_experts = len(source.gate_up_proj)
        self.quant_type = config.bnb_4bit_quant_type
        self.double_quant = config.bnb_4bit_use_double_quant
        self.quant_states: dict[str, list[bnb.functional.QuantState]] = {}
        for weight in _WEIGHTS:
            # Still of the unquantized shape, and without memory: what the loading code compares the checkpoint with.
            self.register_parameter(weight, nn.Parameter(getattr(source, weight).to("meta"), requires_grad=False))
        self._name = name

    def quantize(self, weight: str, values: torch.Tensor) -> nn.Parameter:
        """Quantize each expert by itself.

        Args:
            weight: ``"gate_up_proj"`` or ``"down_proj"``.
            values: [experts, out, in].

        Returns:
            [experts, ceil(out * in / 2)] packed bytes; what is needed to read them is kept in ``quant_states``.
        """
        packed = torch.empty(len(values), (values[0].numel() + 1) // 2, dtype=torch.uint8, device=values.device)
        states = []
        for index, value in enumerate(values):
            data, state = bnb.functional.quantize_4bit(
                value.contiguous(), blocksize=BLOCK, compress_statistics=self.double_quant, quant_type=self.quant_type
            )
            packed[index].copy_(data.view(-1))
            states.append(state)
        self.quant_states[weight] = states
        return nn.Parameter(packed, requires_grad=False)

    def dequantized(self, weight: str) -> torch.Tensor:
        """All experts' matrices, [experts, out, in], in the dtype they had when they were quantized."""
        packed, states = getattr(self, weight), self.quant_states[weight]
        return torch.stack(
            [bnb.functional.dequantize_4bit(p.view(-1, 1), s) for p, s in zip(packed, states, strict=True)]
        )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Mix the chosen experts.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, k] int64, the experts of each token.
            top_k_weights: [tokens, k], their weights.

        Returns:
            [tokens, hidden], in ``hidden_states``' dtype.
        """
        out = torch.zeros_like(hidden_states)
        chosen = top_k_index.flatten()
        # One read from the device a layer, where a lookup for each expert would take as many as there are experts.
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        k, begin = top_k_index.shape[1], 0
        for expert, count in enumerate(counts[: self.num_experts]):
            if count == 0:
                continue
            slots = order[begin : begin + count]
            begin += count
            tokens = torch.div(slots, k, rounding_mode="floor")
            gate, up = self._linear("gate_up_proj", expert, hidden_states[tokens]).chunk(2, dim=-1)
            value = self._linear("down_proj", expert, self.act_fn(gate) * up)
            value = value * top_k_weights.flatten()[slots, None]
            out.index_add_(0, tokens, value.to(out.dtype))
        return out

    def _linear(self, weight: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        # Dequantizes for this product and again in backward, and keeps only the packed weight between the two.
        packed = getattr(self, weight)[expert].view(-1, 1)
        result: torch.Tensor = bnb.matmul_4bit(x, packed.t(), quant_state=self.quant_states[weight][expert])
        return result

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"experts={self.num_experts}, {self.quant_type}, double_quant={self.double_quant}"


def decoded_wrongly(shape: torch.Size | tuple[int, ...], *, blocksize: int = BLOCK) -> bool:
    """Whether bitsandbytes' AVX-512 code decodes a weight of this shape with the wrong scales, and says nothing.

    It gives each row ``columns // blocksize`` blocks, although a block may run on into the next row. The defect's
    report, with a script that shows it, is in ``examples/bitsandbytes_reports``.

    Args:
        shape: of the weight, [..., columns].
        blocksize: weights that share one scale.
    """
    columns = shape[-1] if len(shape) else 1
    rows = math.prod(shape[:-1])
    return rows > 1 and columns % 16 == 0 and columns % blocksize != 0 and blocksize < 2048


def has_fused_experts(model: nn.Module) -> bool:
    """Whether the model has mixture-of-experts layers whose experts are one parameter."""
    return any(True for _ in _fused_experts(model)) or any(isinstance(m, QuantizedExperts) for m in model.modules())


def _fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        fused = {n for n, p in module.named_parameters(recurse=False) if p.dim() == 3}
        if isinstance(module, QuantizedExperts) or not fused:
            continue
        known = fused == set(_WEIGHTS) == {n for n, _ in module.named_parameters(recurse=False)}
        if not known or not hasattr(module, "act_fn") or getattr(module, "is_transposed", False):
            raise ModelError(
                f"precision: the experts in {name} ({type(module).__name__}) have parameters {sorted(fused)}, a form "
                "that cannot be quantized here, and in half precision they would be most of the model: use "
                "--precision bf16"
            )
        yield name, module


def _refuse_misread_layers(model: nn.Module, device_map: Any) -> None:
    """bitsandbytes' CPU code takes wrong scales for some shapes, silently: see examples/bitsandbytes_reports."""
    if not isinstance(device_map, dict) or {str(d) for d in device_map.values()} != {"cpu"}:
        return
    matrices = [
        (name, (module.out_features, module.in_features))
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    ]
    matrices += [(name, getattr(module, w).shape[1:]) for name, module in _fused_experts(model) for w in _WEIGHTS]
    wrong = [(name, shape[-1]) for name, shape in matrices if decoded_wrongly(shape, blocksize=BLOCK)]
    if wrong:
        name, width = wrong[0]
        raise ModelError(
            f"precision: {len(wrong)} layers cannot be used in 4 bits on a CPU, the first is {name} with {width} "
            f"inputs. bitsandbytes decodes a layer wrongly there whose inputs are a multiple of 16 and not of {BLOCK}. "
            "Use --precision bf16 or fp32, or a GPU"
        )
