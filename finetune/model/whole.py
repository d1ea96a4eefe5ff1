"""Checks that a model's files are whole: what is damaged in a folder, and which weights the files do not hold."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune.data.file_kind import what_it_is
from finetune.errors import ModelError
from pytest_vram.probe.quantization import quantization_constants

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

UNUSED_ATTRIBUTE = "finetune_unused_weights"
"""Set on a model whose files hold weights that it does not use: their names."""
_TOGETHER = "Name a folder whose files and config.json belong together"
_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json", "spiece*", "merges.txt")
_AGAIN = "download or copy it again"
UNPICKLED = "pickled weights are not loaded, because they can run code; convert the model to safetensors first"
"""What to do about a model whose weights are pickled."""


def damage(folder: Path, *, weights: bool) -> str | None:
    """Return what is wrong with the files of a model's folder and what to do about it; None if nothing is found.

    It is asked after transformers failed, because the errors of transformers often do not name the file.

    Args:
        folder: the folder that ``--model`` names.
        weights: look at the weights too. Without it, only at the configuration and the tokenizer.
    """
    if not (folder / "config.json").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        return f"the folder has no config.json{f'; did you mean its folder {inside[0]}?' if inside else ''}"
    for file in sorted(folder.glob("*.json")):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"its {file.name} is not JSON ({what_it_is(file) or error}); {_AGAIN}"
        if file.name in ("config.json", "tokenizer_config.json", _INDEX) and not isinstance(found, dict):
            return f"its {file.name} holds no JSON object; {_AGAIN}"
    if not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        return "the folder has no tokenizer; copy the tokenizer's files (tokenizer.json and others) into it"
    return _damaged_weights(folder) if weights else None


def _damaged_weights(folder: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if (folder / _INDEX).is_file():
        named = json.loads((folder / _INDEX).read_text(encoding="utf-8")).get("weight_map", {})
        lost = sorted(set(named.values()) - {file.name for file in files})
        if lost:
            return f"its {_INDEX} names {lost[0]}, which is not there; {_AGAIN}"
    elif not files and any(folder.glob("*.bin")):
        return f"its weights are pickled; {UNPICKLED}"
    elif not files:
        return "the folder has no weights; copy the model's *.safetensors into it"
    elif not (folder / "model.safetensors").is_file():
        return f"the folder has {files[0].name}, and neither model.safetensors nor {_INDEX}; copy what is lost into it"
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"its {file.name} is damaged ({what_it_is(file) or error}); {_AGAIN}"
    return None


def require_weights(model: PreTrainedModel, found: Mapping[str, Any], name: str) -> None:
    """Refuse a model that computes with a weight that its files do not hold, or hold in another shape.

    transformers fills such a weight with random numbers and only warns. In 4 and 8 bits it does not compare shapes.

    Args:
        model: the model as it was loaded.
        found: what ``from_pretrained(..., output_loading_info=True)`` returns beside it.
        name: the name of the model, for the message.

    Raises:
        ModelError: a weight is missing, or its shape differs from that which ``config.json`` asks for.
    """
    parameters = dict(model.named_parameters())
    unused = sorted(found["unexpected_keys"])
    missing = sorted(key for key in found["missing_keys"] if key in parameters)
    if missing:
        head = model.get_output_embeddings()
        of_head = head is not None and all(parameters[key] in set(head.parameters()) for key in missing)
        why = "they are those of a model without a language model's head" if of_head else "config.json asks for it"
        instead = f"; they hold {unused[0]}, which the model does not use" if unused else ""
        raise ModelError(
            f"model = {name!r}: the files do not hold {missing[0]}{_others(missing)}, and {why}{instead}. Without the "
            f"weight the model would compute with random numbers. {_TOGETHER}"
        )
    for key, stored, wanted in [*found["mismatched_keys"], *_other_shapes(model)]:
        raise ModelError(
            f"model = {name!r}: the files hold {key} with the shape {list(stored)}, and config.json asks for "
            f"{list(wanted)}. {_TOGETHER}"
        )
    if unused:
        setattr(model, UNUSED_ATTRIBUTE, tuple(unused))


def require_quantized(model: nn.Module, name: str, stored: str) -> None:
    """Refuse a model whose ``config.json`` says that bitsandbytes quantized it, and whose files hold plain weights.

    Args:
        model: the loaded model.
        name: the value of ``--model``.
        stored: the precision that its ``config.json`` says.

    Raises:
        ModelError: a layer that would be quantized is not.
    """
    for path, module in model.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            weight: Any = module.weight
            sound = weight.dtype == torch.int8 if stored == "int8" else getattr(weight, "quant_state", None) is not None
            if not sound:
                raise ModelError(
                    f"model = {name!r}: its config.json says that its weights are stored in {stored}, and its files "
                    f"hold the weight of {path} as it was before. Remove quantization_config from config.json; "
                    f"--precision {stored} then quantizes the model while it is loaded"
                )


def _other_shapes(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield the weights whose shape is another than that of their layer: name, shape, the layer's shape.

    With a quantized base transformers 5.17 does not compare embeddings and heads either, which stay unquantized.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            wanted: tuple[int, ...] = (module.out_features, module.in_features)
        elif isinstance(module, nn.Embedding):
            wanted = (module.num_embeddings, module.embedding_dim)
        else:
            continue
        stored = _stored_shape(getattr(module, "weight", None))
        if stored is not None and stored != wanted:
            yield f"{path}.weight", stored, wanted


def _stored_shape(weight: Any) -> tuple[int, ...] | None:
    """Return the shape of a weight as it was before quantization; None for a kind that is not known here."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return tuple(state.shape)
    return tuple(weight.shape) if type(weight) is nn.Parameter or type(weight).__name__ == "Int8Params" else None


def told_of_unused_weights(model: PreTrainedModel) -> str | None:
    """Return a note about weights in the files that the model does not use; None if it uses all."""
    unused = getattr(model, UNUSED_ATTRIBUTE, ())
    if not unused:
        return None
    return f"the files hold {unused[0]}{_others(unused)}, which this {model.config.model_type} model does not use"


def _others(names: tuple[str, ...] | list[str]) -> str:
    return "" if len(names) == 1 else f" and {len(names) - 1:,} more {'weight' if len(names) == 2 else 'weights'}"


def not_finite(model: nn.Module) -> str | None:
    """Return the name of the first frozen weight with a value that is infinite or no number; None if there is none.

    Of a quantized weight the scales are looked at, which are not finite where the weight was not.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        for tensor in (*quantization_constants(parameter), parameter):
            if tensor.is_floating_point() and tensor.numel():
                low, high = tensor.aminmax()
                if not bool((low.isfinite() & high.isfinite()).item()):
                    return name
    return None
