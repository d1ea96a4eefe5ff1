"""Completes the settings from ``--model``: an adapter determines rank and layers, a quantized base the precision."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.settings import EMBEDDED_MODEL, AdapterConfig, ModelConfig
from finetune.errors import ConfigError, ModelError, Problem
from finetune.model import adapters
from finetune.model.shapes import find_shape

if TYPE_CHECKING:
    from finetune.config.settings import Precision, RunConfig


def settled(config: RunConfig) -> RunConfig:
    """Return the settings of a run, completed and checked with what its model determines.

    An adapter that is trained further keeps its rank and layers. A base that is quantized already keeps its precision.

    Raises:
        ConfigError: the user asks for something else, or for a merged model without the original weights.
        ModelError: the model cannot be trained here.
    """
    model, name = config.model, config.model.model
    if adapters.is_adapter(name):
        config = dataclasses.replace(config, adapter=adapters.settled(name, config.adapter, AdapterConfig()))
    stored = stored_precision(model)
    if stored is None:
        return config
    if model.precision not in (stored, ModelConfig().precision):
        why, remedy = f"{name} is stored in {stored} already", f"use --precision {stored}"
        raise ConfigError(Problem(field="precision", value=model.precision, why=why, remedy=remedy))
    if config.adapter.full or config.output.merge != "none":
        field, value = ("full", True) if config.adapter.full else ("merge", config.output.merge)
        why = f"{name} is stored in {stored}, and the original weights are not there"
        raise ConfigError(Problem(field=field, value=value, why=why, remedy="name the unquantized model as --model"))
    return dataclasses.replace(config, model=dataclasses.replace(model, precision=stored))


def stored_precision(config: ModelConfig) -> Precision | None:
    """Return how a model is quantized already; None if it is not.

    Raises:
        ModelError: it is quantized in a way that finetune cannot train on.
    """
    stored = _fields(config).get("quantization_config")
    if not stored:
        return None
    if not isinstance(stored, dict):
        raise ModelError(
            f"model = {config.model!r}: the quantization_config in its config.json is {stored!r} and no object; "
            "download or copy the file again"
        )
    if stored.get("load_in_8bit"):
        return "int8"
    kind = stored.get("bnb_4bit_quant_type", "fp4")
    if stored.get("load_in_4bit") and kind in ("nf4", "fp4"):
        return "nf4" if kind == "nf4" else "fp4"
    method = stored.get("quant_method", "an unknown method")
    raise ModelError(
        f"model = {config.model!r}: is quantized already, by {method}, and only what bitsandbytes has quantized can be "
        "trained on as it is. Name the unquantized model; --precision nf4 quantizes it while it is loaded"
    )


def _fields(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of the ``config.json`` of a model, or of an adapter's base; empty without such a file."""
    name = adapters.base_of(config.model) if adapters.is_adapter(config.model) else config.model
    folder = Path(name).expanduser()
    if folder.is_dir():
        try:
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # loading reports what is wrong with it
        return found if isinstance(found, dict) else {}
    if name == EMBEDDED_MODEL or folder.suffix == ".gguf" or folder.is_absolute() or find_shape(name) is not None:
        return {}
    from transformers import PreTrainedConfig

    try:
        asked: dict[str, Any] = PreTrainedConfig.get_config_dict(name)[0]
    except (OSError, ValueError):
        return {}  # the same
    return asked
