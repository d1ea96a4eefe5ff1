"""Quantizes a whole model, mixture-of-experts layers included, while transformers loads it.

transformers keeps a layer's experts as one 3-D parameter and quantizes only ``nn.Linear``, so that a "4-bit"
Mixtral-8x7B keeps 45 of its 47 billion parameters in half precision. The quantizer of this module replaces the experts
with a module of its own before the weights are read. It quantizes each layer's experts when they are read, and the
forward pass dequantizes one expert at a time. Experts whose form transformers does not declare go on running their own
code, which reads packed weights (:mod:`finetune.model.packed_weight`). Layers that have to stay as they are (routers,
and layers whose weight a fused kernel reads) keep 16 bits with 8-bit and with 4-bit quantization.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import get_module_from_name

from finetune.errors import ModelError
from finetune.model import parts
from finetune.model.layers import declared_experts, experts_of, why_not_plain
from finetune.model.packed_weight import BLOCK, is_packed, pack
from finetune.patches.transformers import EightBitLoading, FourBitLoading, apply_gate, is_expert_parallel

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import ConversionOps

METHOD, METHOD_8_BIT = "finetune_4bit", "finetune_8bit"
_UP, _GATED, _DOWN = "up_proj", "gate_up_proj", "down_proj"


@register_quantization_config(METHOD)
class FourBitConfig(BitsAndBytesConfig):  # type: ignore[misc]  # transformers has no annotations
    """bitsandbytes' 4-bit settings, for linear layers and fused experts alike."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(load_in_4bit=True, **settings)
        self.quant_method = METHOD


@register_quantization_config(METHOD_8_BIT)
class EightBitConfig(BitsAndBytesConfig):  # type: ignore[misc]  # transformers has no annotations
    """bitsandbytes' 8-bit settings, for linear layers."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(load_in_8bit=True, **settings)
        self.quant_method = METHOD_8_BIT


@register_quantizer(METHOD)
class FourBitQuantizer(FourBitLoading):
    """Quantizes plain linear layers as transformers does, and fused experts too."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Leave out the layers that have to stay as they are."""
        _leave_out(self.quantization_config, model)

    def complete(self, model: PreTrainedModel, device_map: Any) -> None:
        """Replace each layer's experts with :class:`QuantizedExperts`, or let them keep their own weights packed.

        Raises:
            ModelError: experts cannot be quantized, or a layer cannot be decoded on a CPU.
        """
        config = self.quantization_config
        for name, module in list(experts_of(model)):
            require_whole(name, module)
            if declared_experts(module):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, QuantizedExperts(module, config))
            else:
                double_quant = config.bnb_4bit_use_double_quant
                pack(module, _matrices(module), quant_type=config.bnb_4bit_quant_type, double_quant=double_quant)
        refuse_misread_layers(model, device_map)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Return whether a parameter is stored in 4 bits."""
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, QuantizedExperts):
            return name in module.matrices
        if is_packed(module, name):
            return True
        return bool(super().param_needs_quantization(model, param_name, **kwargs))

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that quantizes a weight after it is read."""
        return _Quantize(self)


@register_quantizer(METHOD_8_BIT)
class EightBitQuantizer(EightBitLoading):
    """Quantizes plain linear layers as transformers does, and refuses models whose experts would stay in 16 bits."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Leave out the layers that have to stay as they are.

        Raises:
            ModelError: the model has fused experts.
        """
        if any(True for _ in experts_of(model)):
            raise ModelError(
                f"precision = 'int8': the experts of this {model.config.model_type} model cannot be stored in 8 bits, "
                "and in 16 they are most of it. Use --precision nf4 or fp4, which quantize them too, or bf16"
            )
        _leave_out(self.quantization_config, model)


def _leave_out(config: BitsAndBytesConfig, model: PreTrainedModel) -> None:
    """Tell transformers which linear layers keep 16 bits: those that it leaves out itself, and those that must."""
    config.llm_int8_skip_modules = [*get_keys_to_not_convert(model), *map(re.escape, why_not_plain(model))]


class _Quantize(Bnb4bitQuantize):  # type: ignore[misc]  # transformers has no annotations
    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, torch.Tensor]:
        model = kwargs["model"]
        result: dict[str, torch.Tensor] = {}
        for name in list(input_dict):
            module, weight = get_module_from_name(model, name)
            if isinstance(module, QuantizedExperts) or is_packed(module, weight):
                value = input_dict.pop(name)
                result[name] = module.quantize(weight, value[0] if isinstance(value, list) else value)
        rest = super().convert(input_dict, **kwargs) if input_dict else {}
        for value in rest.values():
            if parts.wanted():
                parts.keep_of_linear(value)
        return result | rest


class QuantizedExperts(nn.Module):
    """A layer's experts in 4 bits: ``down(gate(up(x)))`` for each token's chosen experts, weighted and summed.

    It computes what ``@use_experts_implementation`` declares: with or without a gate, biases, and a norm after each
    expert. It calls the gate of the source's class, and takes over by name everything else that the source holds
    (biases, norms, numbers).

    Attributes:
        matrices: the names of the quantized parameters, ``gate_up_proj`` (``up_proj`` without a gate) and
            ``down_proj``: [experts, bytes], the packed weights of each expert's [out, in] matrix.
    """

    def __init__(self, source: Any, config: FourBitConfig) -> None:
        super().__init__()
        own = {name: value for name, value in vars(source).items() if name not in vars(self)}
        vars(self).update(own)
        self._modules.update(source._modules)
        self._parameters.update(source._parameters)
        self._buffers.update(source._buffers)
        self._source = type(source)
        self.matrices = (_GATED if source.has_gate else _UP, _DOWN)
        self.num_experts = len(getattr(source, _DOWN))
        self.quant_type = config.bnb_4bit_quant_type
        self.double_quant = config.bnb_4bit_use_double_quant
        self.quant_states: dict[str, list[bnb.functional.QuantState]] = {}
        for weight in self.matrices:
            # The parameter still has the unquantized shape, with which the loading code compares the checkpoint. On the
            # meta device it takes no memory.
            self.register_parameter(weight, nn.Parameter(getattr(source, weight).to("meta"), requires_grad=False))

    def quantize(self, weight: str, values: torch.Tensor) -> nn.Parameter:
        """Quantize each expert separately.

        Args:
            weight: one of ``matrices``.
            values: [experts, out, in]; [experts, in, out] if the source stores them transposed.

        Returns:
            [experts, ceil(out * in / 2)] packed bytes. ``quant_states`` keeps what is needed to decode them.
        """
        if self.is_transposed:
            values = values.transpose(1, 2)
        packed = torch.empty(len(values), (values[0].numel() + 1) // 2, dtype=torch.uint8, device=values.device)
        states = []
        for index, value in enumerate(values):
            data, state = bnb.functional.quantize_4bit(
                value.contiguous(), blocksize=BLOCK, compress_statistics=self.double_quant, quant_type=self.quant_type
            )
            packed[index].copy_(data.view(-1))
            states.append(state)
        self.quant_states[weight] = states
        if parts.wanted():
            packed = parts.keep_of_experts(packed, states)
        return nn.Parameter(packed, requires_grad=False)

    def dequantized(self, weight: str) -> torch.Tensor:
        """Return all experts' matrices as the source stores them, in the dtype they had when they were quantized."""
        packed, states = getattr(self, weight), self.quant_states[weight]
        found = torch.stack(
            [bnb.functional.dequantize_4bit(p.view(-1, 1), s) for p, s in zip(packed, states, strict=True)]
        )
        return found.transpose(1, 2) if self.is_transposed else found

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run each token through its chosen experts, and return the weighted sum of their outputs.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, k] int64, the experts of each token.
            top_k_weights: [tokens, k], the weights of these experts.

        Returns:
            [tokens, hidden], in ``hidden_states``' dtype.
        """
        own: Any = self  # has the attributes of the source
        source: Any = self._source
        out = torch.zeros_like(hidden_states)
        chosen = top_k_index.flatten()
        # This reads from the device once per layer; a lookup for each expert would read once per expert.
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        k, begin = top_k_index.shape[1], 0
        for expert, count in enumerate(counts[: self.num_experts]):
            if count == 0:
                continue
            slots = order[begin : begin + count]
            begin += count
            tokens = torch.div(slots, k, rounding_mode="floor")
            value = self._linear(self.matrices[0], expert, hidden_states[tokens])
            value = apply_gate(source, self, value) if own.has_gate else own.act_fn(value)
            value = self._linear(_DOWN, expert, value)
            if self.has_post_expert_norm:
                value = own.post_expert_norm(value)
            value = value * top_k_weights.flatten()[slots, None]
            out.index_add_(0, tokens, value.to(out.dtype))
        return out

    def _linear(self, weight: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        # This dequantizes the weight for the product, and again in backward. Between the two only the packed weight is
        # kept.
        packed = getattr(self, weight)[expert].view(-1, 1)
        result: torch.Tensor = bnb.matmul_4bit(x, packed.t(), quant_state=self.quant_states[weight][expert])
        return result + getattr(self, f"{weight}_bias")[expert] if self.has_bias else result

    def shape_of(self, weight: str) -> tuple[int, int]:
        """Return the outputs and inputs of each expert's matrix. Call this only before the weights are read."""
        _, outputs, inputs = getattr(self, weight).shape
        return (inputs, outputs) if self.is_transposed else (outputs, inputs)

    def extra_repr(self) -> str:
        """Return the text that ``print(model)`` shows."""
        return f"experts={self.num_experts}, {self.quant_type}, double_quant={self.double_quant}"


def decoded_wrongly(shape: torch.Size | tuple[int, ...], *, blocksize: int = BLOCK) -> bool:
    """Return whether bitsandbytes' AVX-512 code silently decodes a weight of this shape with wrong scales.

    The code assumes ``columns // blocksize`` blocks in each row, although a block may extend into the next row.
    ``examples/bitsandbytes_reports`` holds the report of the defect and a script that shows it.

    Args:
        shape: the shape of the weight, [..., columns].
        blocksize: number of weights that share one scale.
    """
    columns = shape[-1] if len(shape) else 1
    rows = math.prod(shape[:-1])
    return rows > 1 and columns % 16 == 0 and columns % blocksize != 0 and blocksize < 2048


def require_whole(name: str, module: nn.Module) -> None:
    """Refuse experts that cannot be quantized where they are.

    Raises:
        ModelError: transformers has spread the experts of ``name`` over devices, or they are to be sharded and run
            code of their own, which needs them whole.
    """
    experts = f"the experts in {name} ({type(module).__name__})"
    if is_expert_parallel(module):
        raise ModelError(
            f"precision: {experts} are spread over several devices, where they cannot be quantized: load the model "
            "without expert parallelism, or use --precision bf16"
        )
    if parts.wanted() and not declared_experts(module):
        raise ModelError(
            f"shard: {experts} run code of their own, which needs them whole on every card: use --no-shard, with which "
            "every card holds the whole model in 4 bits"
        )


def _matrices(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters that are matrices, and no table of biases."""
    return [name for name, values in module.named_parameters(recurse=False) if values.dim() > 1 and "bias" not in name]


def refuse_misread_layers(model: nn.Module, device_map: Any) -> None:
    """Refuse layers that bitsandbytes' CPU code silently decodes with wrong scales (examples/bitsandbytes_reports).

    Raises:
        ModelError: the model will be on the CPU and has such a layer.
    """
    if not isinstance(device_map, dict) or {str(d) for d in device_map.values()} != {"cpu"}:
        return
    matrices = []
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            matrices.append((name, (module.out_features, module.in_features)))
        elif isinstance(module, QuantizedExperts):
            matrices += [(name, module.shape_of(weight)) for weight in module.matrices]
    wrong = [(name, shape[-1]) for name, shape in matrices if decoded_wrongly(shape, blocksize=BLOCK)]
    if wrong:
        name, width = wrong[0]
        raise ModelError(
            f"precision: {len(wrong)} layers cannot be used in 4 bits on a CPU, the first is {name} with {width} "
            f"inputs. bitsandbytes decodes a layer wrongly there whose inputs are a multiple of 16 and not of {BLOCK}. "
            "Use --precision bf16 or fp32, or a GPU"
        )
