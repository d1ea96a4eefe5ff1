"""Reads a saved adapter and attaches it to its base, to train it further, to merge it or to use it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.file_kind import what_it_is
from finetune.errors import ConfigError, ModelError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from finetune.config.settings import AdapterConfig

_PEFT_DEFAULT = 8
"""The rank and the alpha of peft, where an adapter's configuration leaves them out."""
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
"""The kinds of adapters that are tokens before the text. peft cannot merge them into the weights of a base."""
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(name: str) -> bool:
    """Return whether a model's name is a folder that holds an adapter and no model."""
    folder = Path(name).expanduser()
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def base_of(name: str) -> str:
    """Return the name of the base that the adapter in a folder was trained on, from its ``adapter_config.json``.

    Raises:
        ModelError: the file names no base, or the adapter is of a kind that cannot be trained here.
    """
    settings = _read(name)
    if settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type")
        remedy = (
            "It cannot be merged: name its base as --model, and begin a new adapter"
            if kind in _PROMPTS
            else "Merge it into its base with peft, and name the merged model"
        )
        raise ModelError(f"model = {name!r}: an adapter of kind {kind}, and only LORA can be trained here. {remedy}")
    base = settings.get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"model = {name!r}: an adapter whose {CONFIG_FILE} names no base. Write the base's folder or hub name "
            "into its base_model_name_or_path"
        )
    if not (Path(name).expanduser() / WEIGHTS_FILE).is_file():
        raise ModelError(
            f"model = {name!r}: an adapter without {WEIGHTS_FILE}. Pickled weights are not loaded, they can run code: "
            "load and save the adapter with peft first"
        )
    if is_adapter(str(base)):
        raise ModelError(
            f"model = {name!r}: its base {base} is an adapter too, and an adapter is trained on a model. Merge {base} "
            f"into its own base with peft, and write the merged model into base_model_name_or_path of {CONFIG_FILE}"
        )
    return str(base)


def settled(name: str, config: AdapterConfig, default: AdapterConfig) -> AdapterConfig:
    """Return the settings of a run that trains the adapter in a folder further. They are the adapter's own settings.

    Args:
        name: the folder.
        config: the settings that the user asks for.
        default: the defaults. A setting that equals its default counts as not asked for.

    Raises:
        ConfigError: the user asks for a setting that differs from the adapter's.
        ModelError: the adapter cannot be trained here.
    """
    base_of(name)
    saved = _read(name)
    targets = saved.get("target_modules") or ()
    own = {
        "rank": _number(name, saved, "r"),
        "alpha": float(_number(name, saved, "lora_alpha")),
        "rslora": bool(saved.get("use_rslora")),
        "dora": bool(saved.get("use_dora")),
        "targets": (targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        "exclude": (),
        "full": False,
        "init": "default",
    }
    problems = []
    for field, value in own.items():
        asked = getattr(config, field)
        if asked not in (getattr(default, field), value):
            why = f"the adapter in {name} has {value!r}" if field not in ("full", "init") else f"{name} is an adapter"
            remedy = f"leave --{field} out, or name the base as --model and begin a new adapter"
            problems.append(Problem(field=field, value=asked, why=why, remedy=remedy))
    if problems:
        raise ConfigError(*problems)
    return dataclasses.replace(config, **own)


def load_adapter(base: nn.Module, folder: str | Path, *, trainable: bool = False, dropout: float | None = None) -> Any:
    """Attach a saved adapter to the layers that it was trained with.

    ``PeftModel.from_pretrained`` does the same for most models. In mixtures of experts it mistakes dense layers for the
    experts that transformers stored one by one before version 5, because of their names, and adapts other weights.

    Args:
        base: the model that :func:`finetune.model.load.load_base` returns, without an adapter.
        folder: the folder of the adapter.
        trainable: whether to train it further.
        dropout: dropout on the adapter's input, in place of the one that it was trained with.

    Returns:
        A ``PeftModel``.

    Raises:
        ModelError: the adapter is not one of this base.
    """
    from peft import LoraConfig, get_peft_model

    try:
        settings = LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise ModelError(f"model = {str(folder)!r}: its {CONFIG_FILE} cannot be used: {error}") from error
    settings.inference_mode = not trainable
    if dropout is not None:
        settings.lora_dropout = dropout
    weights = _weights(folder)
    with _as_saved(base, weights):
        try:
            model: Any = get_peft_model(base, settings, autocast_adapter_dtype=False)
        except ValueError as error:  # no layer has the name of a target
            raise _not_of_this_base(folder, str(error).strip().splitlines()[0].rstrip(".")) from error
        _fill(model, weights, folder)
    return model


def restore(model: Any, folder: str | Path) -> None:
    """Copy the saved weights into an adapter from :func:`load_adapter` again, converted to the dtype it has now."""
    weights = _weights(folder)
    with _as_saved(model.get_base_model(), weights):
        _fill(model, weights, folder)


def _weights(folder: str | Path) -> Mapping[str, Any]:
    """Read the matrices of an adapter.

    Raises:
        ModelError: the file is damaged.
    """
    from peft import load_peft_weights
    from safetensors import SafetensorError

    try:
        weights: Mapping[str, Any] = load_peft_weights(str(folder), device="cpu")
    except (SafetensorError, OSError) as error:
        told = what_it_is(Path(folder).expanduser() / WEIGHTS_FILE) or error
        raise ModelError(
            f"model = {str(folder)!r}: its {WEIGHTS_FILE} is damaged ({told}); download or copy it again"
        ) from error
    return weights


def _as_saved(base: nn.Module, weights: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Return ``as_named()`` if every saved matrix belongs to a layer of this base, and an empty context otherwise.

    An adapter that was trained with transformers 4 may have matrices for layers that no longer exist. peft then finds
    the layers that replace them.
    """
    from finetune.model.layers import linear_layers
    from finetune.patches.peft import as_named

    layers = {path for path, _ in linear_layers(base)}
    paths = {key.partition(".lora_")[0].removeprefix("base_model.model.") for key in weights if ".lora_" in key}
    return as_named() if paths <= layers else contextlib.nullcontext()


def _fill(model: Any, weights: Mapping[str, Any], folder: str | Path) -> None:
    from peft import set_peft_model_state_dict

    try:
        found = set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise _not_of_this_base(folder, str(error).strip().splitlines()[-1].strip()) from error
    lost = [*(key for key in found.missing_keys if ".lora_" in key), *found.unexpected_keys]
    if lost:
        raise _not_of_this_base(folder, f"{len(lost)} matrices have no counterpart, the first is {lost[0]}")


def _not_of_this_base(folder: str | Path, what: str) -> ModelError:
    return ModelError(
        f"model = {str(folder)!r}: the adapter is not one of this base: {what}. Name the base that it was trained "
        f"on in base_model_name_or_path of its {CONFIG_FILE}"
    )


def _number(name: str, saved: Mapping[str, Any], field: str) -> Any:
    value = saved.get(field, _PEFT_DEFAULT)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ModelError(f"model = {name!r}: {field} in its {CONFIG_FILE} is {value!r}, not a number")
    return value


def _read(name: str) -> dict[str, Any]:
    file = Path(name).expanduser() / CONFIG_FILE
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model = {name!r}: its {CONFIG_FILE} cannot be read: {error}. Name a whole adapter folder"
        ) from error
    return found
