"""Has the configurations of public models, with which a training step is measured without a hub and without weights.

Each ``NAME.json`` holds the fields of the model's published ``config.json``, without those that have transformers'
default.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One public model.

    Attributes:
        name: the name that a user types, which is also the name of the file.
        hub: the repository on the hub that the ``config.json`` comes from.
        parameters: the count that the hub publishes for its safetensors files; tied weights count once.
        aliases: other names for it, in lower case. The last part of ``hub`` is an alias too, and is not listed.
    """

    name: str
    hub: str
    parameters: int
    aliases: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The path of its ``config.json``."""
        return Path(__file__).with_name(f"{self.name}.json")

    def fields(self) -> dict[str, Any]:
        """Return the fields of its ``config.json``."""
        found: dict[str, Any] = json.loads(self.path.read_text())
        return found


_ALL = (
    Shape(name="mistral-7b", hub="mistralai/Mistral-7B-v0.1", parameters=7_241_732_096, aliases=("mistral",)),
    Shape(name="mixtral-8x7b", hub="mistralai/Mixtral-8x7B-v0.1", parameters=46_702_792_704, aliases=("mixtral",)),
    Shape(name="llama-2-7b", hub="meta-llama/Llama-2-7b-hf", parameters=6_738_415_616, aliases=("llama2-7b",)),
    Shape(name="llama-2-13b", hub="meta-llama/Llama-2-13b-hf", parameters=13_015_864_320, aliases=("llama2-13b",)),
    Shape(name="llama-2-70b", hub="meta-llama/Llama-2-70b-hf", parameters=68_976_648_192, aliases=("llama2-70b",)),
    Shape(
        name="llama-3.1-8b",
        hub="meta-llama/Llama-3.1-8B",
        parameters=8_030_261_248,
        aliases=("llama3.1-8b", "llama-3-8b", "meta-llama-3.1-8b"),
    ),
    Shape(name="llama-3.2-1b", hub="meta-llama/Llama-3.2-1B", parameters=1_235_814_400, aliases=("llama3.2-1b",)),
    Shape(name="llama-3.2-3b", hub="meta-llama/Llama-3.2-3B", parameters=3_212_749_824, aliases=("llama3.2-3b",)),
    Shape(name="qwen2.5-0.5b", hub="Qwen/Qwen2.5-0.5B", parameters=494_032_768, aliases=("qwen-2.5-0.5b",)),
    Shape(name="qwen2.5-7b", hub="Qwen/Qwen2.5-7B", parameters=7_615_616_512, aliases=("qwen-2.5-7b",)),
    Shape(name="gemma-2-2b", hub="google/gemma-2-2b", parameters=2_614_341_888, aliases=("gemma2-2b",)),
    Shape(name="gemma-2-9b", hub="google/gemma-2-9b", parameters=9_241_705_984, aliases=("gemma2-9b",)),
    Shape(
        name="phi-3-mini",
        hub="microsoft/Phi-3-mini-4k-instruct",
        parameters=3_821_079_552,
        aliases=("phi3-mini", "phi-3-mini-4k"),
    ),
    Shape(
        name="smollm2-135m",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        parameters=134_515_008,
        aliases=("smollm2", "smollm2-135m-instruct"),
    ),
)
SHAPES: dict[str, Shape] = {shape.name: shape for shape in _ALL}
"""Every shape by its name."""

_SUFFIXES = re.compile(r"(?:-(?:instruct|it|chat|hf|v0\.[1-3]))+$")
_NAMES: dict[str, Shape] = {
    name: shape for shape in _ALL for name in (shape.name, shape.hub.rpartition("/")[2].lower(), *shape.aliases)
}


def find_shape(name: str) -> Shape | None:
    """Return the shape with this name, alias or hub name, in upper or lower case; None if there is none.

    The name of a model that differs from a shape only in its weights (``meta-llama/Llama-3.1-8B-Instruct``) finds that
    shape too. A hub name with another owner finds none, because it may be another model.
    """
    owner, _, asked = name.strip().lower().rpartition("/")
    found = _NAMES.get(asked) or _NAMES.get(_SUFFIXES.sub("", asked.removeprefix("meta-")))
    if found is None or (owner and owner != found.hub.partition("/")[0].lower()):
        return None
    return found


def near_shapes(name: str, *, cutoff: float = 0.5) -> list[str]:
    """Return the names of shapes that a misspelt ``name`` may mean, nearest first. ``cutoff`` is that of difflib."""
    near = difflib.get_close_matches(name.strip().lower().rpartition("/")[2], _NAMES, n=3, cutoff=cutoff)
    return list(dict.fromkeys(_NAMES[other].name for other in near))
