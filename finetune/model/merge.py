"""Merges an adapter into one model, W + BA, with the W that was trained on or with the original one.

The two differ. The adapter was trained on top of the *quantized* weights and has learned to make up for their error:

* ``quantized-base`` writes dequant(quant(W)) + BA: the model that was trained, up to the rounding of the written dtype.
* ``full-base`` writes W + BA with the original weights, which do not have the quantization error that BA makes up for.
  The model is often better and never the same, so evaluate it before you use it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import torch

from finetune.model.adapters import load_adapter
from finetune.model.load import load_base

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from finetune.config.settings import RunConfig

_PRECISIONS: dict[torch.dtype, Literal["fp32", "fp16", "bf16"]] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


def merge(model: PreTrainedModel, adapter: Path, config: RunConfig, folder: Path) -> None:
    """Write the merged model as safetensors into ``folder``.

    The base is loaded once more, unquantized, on the CPU. During that time the whole base is in host memory.

    Args:
        model: the trained model with its adapter, which is not changed.
        adapter: folder of the saved adapter.
        config: ``config.output.merge`` says which base to use.
        folder: the folder for ``config.json`` and the weights.
    """
    dtype = next(p.dtype for p in model.get_input_embeddings().parameters())
    precision = _PRECISIONS[dtype]
    dense = load_base(dataclasses.replace(config.model, precision=precision, compute_dtype=precision, device="cpu"))
    if config.output.merge == "quantized-base":
        take_over_weights(dense, model)
    merged: Any = load_adapter(dense, adapter).merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder)


def take_over_weights(dense: nn.Module, quantized: Any) -> int:
    """Copy the dequantized weights of ``quantized`` into ``dense``, in place.

    Returns:
        The number of weights that were copied.
    """
    count = 0
    with torch.no_grad():
        for name, weight in dequantized_weights(quantized.get_base_model()):
            dense.get_parameter(name).copy_(weight)
            count += 1
    return count


def dequantized_weights(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each quantized weight of ``base``, decoded, with its name in the unquantized model."""
    from peft.utils.integrations import dequantize_module_weight

    for name, module in base.named_modules():
        plain = name.replace(".base_layer", "")
        # An adapted layer also has a `weight`, that of the layer that it wraps. The loop reaches that layer itself.
        own = module._parameters.get("weight")
        if type(own).__name__ in ("Params4bit", "Int8Params"):
            yield f"{plain}.weight", dequantize_module_weight(module)
        for parameter in getattr(module, "quant_states", {}):  # fused experts
            yield f"{plain}.{parameter}", module.dequantized(parameter)
