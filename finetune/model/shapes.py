"""Loads the configurations of public models, with which a step is measured without a hub and without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.errors import ConfigError, Problem
from pytest_vram.shapes import SHAPES, Shape, find_shape, near_shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["SHAPES", "Shape", "find_shape", "load_shape", "near_shapes"]


def load_shape(name: str) -> PretrainedConfig:
    """Return the transformers configuration of the shape that :func:`find_shape` finds.

    Raises:
        ConfigError: there is no shape of that name; the message lists shapes with a similar name.
    """
    shape = find_shape(name)
    if shape is None:
        raise _unknown(name)
    from transformers import AutoConfig

    fields = shape.fields()
    config: PretrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return config


def _unknown(name: str) -> ConfigError:
    meant = near_shapes(name)
    return ConfigError(
        Problem(
            field="model",
            value=name,
            why="is no shape that comes with finetune" + (f"; did you mean {' or '.join(meant)}?" if meant else ""),
            remedy=f"use one of {', '.join(SHAPES)}, or a folder with a config.json",
        )
    )
