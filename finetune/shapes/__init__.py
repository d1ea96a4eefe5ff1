"""Public model shapes: what a dry run or an estimate needs of a model, without a hub and without weights.

Each JSON file has the model's configuration, its source on the hub and its published number of parameters.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One public model."""

    name: str
    source: str
    """Its name on the hub."""
    parameters: int
    """As published; a test counts them."""
    config: dict[str, Any]
    """What ``config.json`` says."""


@lru_cache(maxsize=1)
def shapes() -> dict[str, Shape]:
    """Every shape by its name, sorted."""
    found = [Shape(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(_FOLDER.glob("*.json"))]
    return {shape.name: shape for shape in found}


def find_shape(name: str) -> Shape | None:
    """The shape of that name or hub name, in any case; ``None`` where there is none."""
    wanted = name.lower().removesuffix("-hf")
    for shape in shapes().values():
        if wanted in (shape.name, shape.source.lower().removesuffix("-hf")):
            return shape
    return None


def load_shape(name: str) -> PretrainedConfig:
    """The configuration of a public model, as transformers' object.

    Raises:
        ModelError: no shape has that name; near ones are named.
    """
    from transformers import AutoConfig

    shape = find_shape(name)
    if shape is None:
        near = difflib.get_close_matches(name.lower(), shapes(), n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ModelError(f"model = {name!r}: no such shape; {hint}There are {', '.join(shapes())}")
    fields = {key: value for key, value in shape.config.items() if key != "model_type"}
    config: PretrainedConfig = AutoConfig.for_model(shape.config["model_type"], **fields)
    return config
