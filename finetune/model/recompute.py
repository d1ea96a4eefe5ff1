"""Chooses which layers of a decoder compute their activations again in the backward pass.

The first layers recompute, and the last ones keep their activations. The backward pass begins with the last layer, so
what it keeps is freed before the first layers recompute. The last layer costs the least to keep: if it recomputed, its
activations would exist again for its own backward pass, though no longer beside the logits.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.config.recompute import layers_recomputed
from finetune.errors import ConfigError, Problem
from finetune.model.checks import check_checkpointing
from finetune.model.forward import base_model, decoder_of, set_checkpointing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from finetune.config.settings import Checkpointing


def layers_of(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the layers that can recompute one by one, in order; none if the model recomputes all of them or none.

    A model has thousands of modules, and every micro-batch asks. So the modules are searched once, and again when a
    layer was replaced, added or removed.
    """
    base = base_model(model)
    root = decoder_of(base) or base
    places = _places.get(root)
    layers = [] if places is None else [place.layer() for place in places]
    if not layers or None in layers:
        _places[root] = list(_search(root, set()))
        layers = [place.layer() for place in _places[root]]
    return [layer for layer in layers if layer is not None]


class _Place:
    """Where a layer was found. Nothing here keeps a model alive."""

    def __init__(self, parent: nn.Module, name: str) -> None:
        self._parent, self._name, self._children = weakref.ref(parent), name, len(parent._modules)
        self._layer = weakref.ref(parent._modules[name])

    def layer(self) -> GradientCheckpointingLayer | None:
        """Return the layer; None if it is no longer there, or no longer one of as many."""
        parent, layer = self._parent(), self._layer()
        if parent is None or len(parent._modules) != self._children or parent._modules.get(self._name) is not layer:
            return None
        return layer


_places: weakref.WeakKeyDictionary[nn.Module, list[_Place]] = weakref.WeakKeyDictionary()
"""Of each decoder that was searched, where its layers are."""


def _search(module: nn.Module, seen: set[nn.Module]) -> Iterator[_Place]:
    """Yield the places of the layers below ``module``, in order, each layer once and none that is inside another."""
    for name, child in module.named_children():
        if child in seen:
            continue
        seen.add(child)
        if isinstance(child, GradientCheckpointingLayer):
            yield _Place(module, name)
        else:
            yield from _search(child, seen)


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
