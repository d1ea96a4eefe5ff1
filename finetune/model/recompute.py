"""Chooses which layers of a decoder compute their activations again in the backward pass.

The first layers recompute, and the last ones keep their activations. The backward pass begins with the last layer, so
what it keeps is freed before the first layers recompute. The last layer costs the least to keep: if it recomputed, its
activations would exist again for its own backward pass, though no longer beside the logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.config.recompute import layers_recomputed
from finetune.errors import ConfigError, Problem
from finetune.model.checks import check_checkpointing
from finetune.model.forward import base_model, decoder_of, set_checkpointing

if TYPE_CHECKING:
    from torch import nn

    from finetune.config.settings import Checkpointing


def layers_of(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the layers that can recompute one by one, in order; none if the model recomputes all of them or none."""
    base = base_model(model)
    found: list[GradientCheckpointingLayer] = []
    inside: tuple[str, ...] = ()
    for name, module in (decoder_of(base) or base).named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not name.startswith(inside):
            inside += (f"{name}.",)
            found.append(module)
    return found


def set_recompute(model: nn.Module, setting: Checkpointing) -> None:
    """Let the first layers recompute, as many as the setting says, and the others keep their activations.

    Raises:
        ConfigError: the model cannot recompute, or only all of its layers, or has fewer layers.
    """
    layers = layers_of(model)
    count = layers_recomputed(setting, max(1, len(layers)))
    if isinstance(setting, int) and not isinstance(setting, bool) and setting > len(layers):
        raise ConfigError(_too_many(model, setting, len(layers)))
    set_checkpointing(model, enabled=count > 0)
    for number, layer in enumerate(layers):
        if layer.gradient_checkpointing != (number < count):
            layer.gradient_checkpointing = number < count


def usable(model: nn.Module, setting: Checkpointing) -> tuple[Checkpointing, str | None]:
    """Return the setting as this model can have it, and a note for the user if ``auto`` became ``none``.

    Raises:
        ConfigError: the model cannot recompute, or only all of its layers, or has fewer layers.
    """
    if layers_recomputed(setting, 1) == 0:
        return setting, None
    try:
        check_checkpointing(model)
    except ConfigError as error:
        if setting != "auto":
            raise
        return "none", f"no layer recomputes its activations: {error.problems[0].why}"
    set_recompute(model, setting)
    set_checkpointing(model, enabled=False)
    return setting, None


def _too_many(model: nn.Module, setting: int, layers: int) -> Problem:
    kind = base_model(model).config.model_type
    if layers:
        why = f"this {kind} model has {layers} layers"
        return Problem(field="checkpointing", value=setting, why=why, remedy=f"use all, or a number below {layers}")
    why = f"this {kind} model recomputes all of its layers or none"
    return Problem(field="checkpointing", value=setting, why=why, remedy="use all or none")
