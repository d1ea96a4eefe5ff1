"""Write the folder that a program gets in place of a model on the hub: configuration, empty weights, tokenizer."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_vram.drygpu.checkpoint import empty_checkpoint
from pytest_vram.errors import VramUsageError
from pytest_vram.shapes import SHAPES, find_shape, near_shapes
from pytest_vram.standins.tokenizer import FILES, write_tokenizer

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "model*.gguf")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStandIn:
    """What a program gets when it asks for a model.

    Attributes:
        name: the name that the program asks for: ``owner/name`` on the hub, or a folder.
        source: a ``config.json``, the folder with one, or the name of a shape that comes with this package.
    """

    name: str
    source: str

    @property
    def is_folder(self) -> bool:
        """Whether the name is that of a folder on this machine and not of a model on the hub."""
        return self.name.startswith((".", "/", "~"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What is made up in the folder of a stand-in: its weights, its tokenizer."""

    weights: bool
    tokenizer: bool


def parse_shape(text: str) -> ModelStandIn:
    """Read ``NAME=PATH``, or ``NAME`` alone for a model whose shape comes with this package.

    Raises:
        VramUsageError: the path has no ``config.json``, or no shape has the name.
    """
    name, equals, source = text.partition("=")
    if not name or (equals and not source):
        raise VramUsageError(f"--shape {text!r}: write NAME=PATH, where PATH is a config.json or a folder with one")
    if name.startswith((".", "/", "~")) and not equals:
        raise VramUsageError(f"--shape {text!r}: a folder has no shape of its own: write {text}=PATH or {text}=SHAPE")
    found = ModelStandIn(name=name, source=source or name)
    if _config_file(found.source) is None and find_shape(found.source) is None:
        near = near_shapes(found.source)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise VramUsageError(
            f"--shape {text!r}: {found.source!r} is neither a config.json, nor a folder with one, nor a shape that"
            f" comes with pytest-vram ({', '.join(SHAPES)}){meant}"
        )
    return found


def write_model(stand_in: ModelStandIn, folder: Path) -> Written:
    """Write the model into ``folder``, which must be empty or new.

    The files of a source folder are linked. Weights that it lacks are empty, and a tokenizer that it lacks is
    :mod:`pytest_vram.standins.tokenizer`.

    Raises:
        VramUsageError: the configuration cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = _config_file(stand_in.source)
    given = file.parent if file is not None and Path(stand_in.source).expanduser().is_dir() else None
    weights = given is None or not any(next(given.glob(pattern), None) for pattern in _WEIGHTS)
    if weights:
        shape = find_shape(stand_in.source)
        fields: Any = json.loads(file.read_text()) if file is not None else shape.fields() if shape else {}
        try:
            empty_checkpoint(fields, folder)
        except VramUsageError as error:
            raise VramUsageError(f"--shape {stand_in.name}={stand_in.source}: {error}") from error
    for path in sorted(given.iterdir()) if given is not None else ():
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve(), target_is_directory=path.is_dir())
    tokenizer = not any((folder / name).exists() for name in FILES)
    if tokenizer:
        _complete(folder)
    return Written(weights=weights, tokenizer=tokenizer)


def _complete(folder: Path) -> None:
    """Write the tokenizer, and the file that tells its special tokens to programs that generate text."""
    fields = json.loads((folder / "config.json").read_text())
    # A model that reads images keeps what concerns its text in a part of its own.
    fields = {**fields, **(fields.get("text_config") or {})}
    write_tokenizer(folder, fields)
    generation = folder / "generation_config.json"
    if not generation.exists():
        ids = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if fields.get(name)}
        generation.write_text(json.dumps(ids, indent=2) + "\n")


def _config_file(source: str) -> Path | None:
    path = Path(os.path.expanduser(source))
    file = path / "config.json" if path.is_dir() else path
    return file if file.is_file() else None
