"""A hook of mkdocs: shows Sphinx's roles in docstrings as plain names, because mkdocstrings does not know them."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>(?:~(?:\w+\.)*)?")


def on_page_content(html: str, **_: Any) -> str:
    """Return a page in which ``:func:`~package.name``` is ``name``, as code."""
    return _ROLE.sub("<code>", html)
