"""Prepare a cache folder of the Hugging Face hub with the stand-ins, so that programs load them without network.

Every tool that uses ``huggingface_hub`` reads that folder, so that none of them has to be patched.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vram.errors import VramUsageError
from pytest_vram.shapes import find_shape
from pytest_vram.standins.model import ModelStandIn, Written, write_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_COMMIT = "0" * 40
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_CONFIGS = (".yml", ".yaml", ".json", ".toml", ".py")
# Older libraries read these before HF_HUB_CACHE.
_OLDER_NAMES = ("TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE", "HUGGINGFACE_HUB_CACHE")


def prepare(
    folder: Path, models: Iterable[ModelStandIn], data: Mapping[str, Path], environment: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, Written]]:
    """Write the cache folder.

    What the user's own cache holds stays there to be found, through links.

    Args:
        folder: an empty folder.
        models: the models that are replaced. Folders are written by :func:`write_folder`.
        data: the file that replaces each data set, by the data set's name.
        environment: the variables of the program, which tell where the user's cache is.

    Returns:
        The variables that make programs use the folder, and what was made up of each model.
    """
    hub, prepared = folder / "hub", folder / "datasets"
    hub.mkdir()
    prepared.mkdir()
    made = {model.name: write_model(model, _snapshot(hub, "models", model.name)) for model in models}
    for name, file in data.items():
        snapshot = _snapshot(hub, "datasets", name)
        snapshot.mkdir(parents=True)
        (snapshot / file.name).symlink_to(file.resolve())
    _link(hub_cache(environment), hub)
    replaced = {name.replace("/", "___").lower() for name in data}
    _link(_data_cache(environment), prepared, besides=replaced)
    return {"HF_HUB_CACHE": str(hub), "HF_DATASETS_CACHE": str(prepared), "HF_HUB_OFFLINE": "1"}, made


def forget_older_names(variables: dict[str, str]) -> None:
    """Remove the older names of the cache folder from ``variables``: they would win over the prepared one."""
    for name in _OLDER_NAMES:
        variables.pop(name, None)


def write_folder(model: ModelStandIn) -> tuple[Path, Written]:
    """Write a model into the folder that the program reads it from, and return the folder.

    Raises:
        VramUsageError: there is such a folder already.
    """
    folder = Path(model.name).expanduser()
    if folder.exists():
        raise VramUsageError(
            f"--shape {model.name}={model.source}: there is such a folder already, and it is not overwritten: name one"
            " that does not exist"
        )
    try:
        return folder, write_model(model, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def known_names(command: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return the names of hub models in a command, and in the configuration files that it names, with a known shape.

    A model in the user's cache is left out, because the program can load it.
    """
    cache = hub_cache(environment)
    found: dict[str, None] = {}
    for text in _texts(command):
        for name in _REPOSITORY.findall(text):
            if find_shape(name) is not None and not (cache / _folder_name("models", name) / "snapshots").is_dir():
                found[name] = None
    return list(found)


def _texts(command: Sequence[str]) -> Iterator[str]:
    for argument in command:
        yield argument
        path = Path(argument)
        if path.suffix in _CONFIGS and path.is_file():
            with suppress(OSError, UnicodeDecodeError):
                yield path.read_text()


def hub_cache(environment: Mapping[str, str]) -> Path:
    """Return the user's cache folder of the hub, as ``huggingface_hub`` finds it."""
    named = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    return Path(named).expanduser() if named else _home(environment) / "hub"


def _data_cache(environment: Mapping[str, str]) -> Path:
    named = environment.get("HF_DATASETS_CACHE")
    return Path(named).expanduser() if named else _home(environment) / "datasets"


def _home(environment: Mapping[str, str]) -> Path:
    base = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environment.get("HF_HOME") or os.path.join(base, "huggingface")).expanduser()


def _snapshot(hub: Path, kind: str, name: str) -> Path:
    repository = hub / _folder_name(kind, name)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(_COMMIT)
    return repository / "snapshots" / _COMMIT


def _folder_name(kind: str, name: str) -> str:
    return "--".join((kind, *name.split("/")))


def _link(source: Path, folder: Path, besides: Iterable[str] = ()) -> None:
    left_out = set(besides)
    for path in sorted(source.iterdir()) if source.is_dir() else ():
        if path.is_dir() and path.name not in left_out and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve(), target_is_directory=True)
