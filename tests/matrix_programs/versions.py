"""Prints the versions of this Python and of the packages that are named, as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


packages = {package: version(package) for package in sys.argv[1:]}
print(json.dumps({"python": platform.python_version(), "packages": packages}))
