"""Call a function as soon as torch, or one of its modules, is imported.

``sitecustomize`` loads this file too, so it imports nothing of this package.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def after_torch(action: Callable[[], None]) -> None:
    """Call ``action`` once, when the import of torch has finished.

    If torch is already imported, ``action`` is called at once. If a call is already waiting for the import, nothing is
    added, even if it was made by another copy of this module.
    """
    after_import("torch", action)


def after_import(name: str, action: Callable[[], None]) -> None:
    """Call ``action`` when the module ``name`` has been imported: at once, if it is already.

    A module that was asked for before keeps the first action.
    """
    if name in sys.modules:
        action()
    elif not any(getattr(finder, "follows", None) == name for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchFinder(name, action))


class TorchFinder(importlib.abc.MetaPathFinder):
    """An import finder that wraps the loader of one module, so that ``action`` runs after its import.

    A search for the module that is not followed by its import, such as ``find_spec("torch")``, does not run ``action``.
    """

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.follows = name
        self._action = action
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's specification, with its loader replaced by :class:`_ThenAct`; None for other modules."""
        if fullname != self.follows or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenAct(spec.loader, self._action)
        return spec


class _ThenAct(importlib.abc.Loader):
    """Executes torch with its own loader, restores that loader, and then calls ``action``."""

    def __init__(self, loader: importlib.abc.Loader, action: Callable[[], None]) -> None:
        self._loader, self._action = loader, action

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._action()
