"""What happens in a process with dry GPUs as soon as it has imported torch."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vram.drygpu import driver

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

SITE_FOLDER = Path(__file__).parent / "inherited"
"""Put on ``PYTHONPATH`` by ``inherited``: its ``sitecustomize`` calls ``watch`` in every Python process below."""

RECORD_VARIABLE = "PYTEST_VRAM_RECORD"
"""Names the folder where each process leaves its figures when it ends; not set: it leaves none."""

SNAPSHOT_VARIABLE = "PYTEST_VRAM_SNAPSHOT"
"""Names the file for torch's memory history; not set: none is recorded."""


def inherited(base: Mapping[str, str]) -> dict[str, str]:
    """The variables that make child processes carry values too, given the environment ``base``."""
    before = [path for path in base.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != SITE_FOLDER]
    return {"PYTHONPATH": os.pathsep.join([str(SITE_FOLDER), *before])}


def watch() -> None:
    """Carry values from the moment torch is imported; at once, if it is already."""
    if not driver.is_active():
        return
    if "torch" in sys.modules:
        _torch_is_there()
    elif not any(isinstance(finder, _TorchFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchFinder())


def _torch_is_there() -> None:
    from pytest_vram.drygpu import values

    values.install()
    folder = os.environ.get(RECORD_VARIABLE)
    if folder:
        from pytest_vram.drygpu import recorder

        recorder.begin(Path(folder))


class _TorchFinder(importlib.abc.MetaPathFinder):
    """Lets others find torch, and adds what comes after its import. Being asked does not mean being imported."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch" or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec("torch")
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenStart(spec.loader)
        return spec


class _ThenStart(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _torch_is_there()
