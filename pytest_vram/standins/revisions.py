"""Give a program a stand-in at whatever revision it asks for: the prepared cache has one revision, ``main``.

This is the only patch of ``huggingface_hub``. It was tried with versions 1.17 to 2.4. It may go when the library finds
any revision of a repository in a prepared cache while it is offline.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from typing import TYPE_CHECKING, Any

from pytest_vram.drygpu.process.variables import MODELS_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable

_PLACES = (
    ("huggingface_hub.file_download", "hf_hub_download"),
    ("huggingface_hub.file_download", "try_to_load_from_cache"),
    ("huggingface_hub._snapshot_download", "snapshot_download"),
)


def install() -> None:
    """Ignore the revision of each stand-in from now on in this process. ``huggingface_hub`` must be imported.

    Other modules copy these functions when they are imported, so this comes before those imports.
    """
    import importlib

    names = frozenset(json.loads(os.environ.get(MODELS_VARIABLE) or "[]"))
    for module_name, function_name in _PLACES:
        module = importlib.import_module(module_name)
        setattr(module, function_name, at_any_revision(getattr(module, function_name), names))


def at_any_revision(original: Callable[..., Any], names: frozenset[str]) -> Callable[..., Any]:
    """Return a function of ``huggingface_hub`` that ignores which revision of a model in ``names`` is asked for."""
    parameters = list(inspect.signature(original).parameters)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Not `Signature.bind`: the library takes keywords of its earlier versions too, and drops them.
        given = dict(zip(parameters, args, strict=False)) | kwargs
        if given.get("repo_id") in names and given.get("repo_type") in (None, "model"):
            given.pop("revision", None)
            return original(**given)
        return original(*args, **kwargs)

    return call
