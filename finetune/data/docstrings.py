"""The embedded data: the functions of Python's standard library, each with the first paragraph of its docstring.

Every Python brings these rows with it. They are short, people wrote them, and a small model learns their form soon.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

PROMPT = "Write a one-sentence docstring for this Python function:\n\n{code}"
"""The question; ``code`` is the function without its docstring and comments, as ``ast.unparse`` writes it."""
CODE_CHARACTERS = 300
"""Longest function, about 90 tokens."""
_DOCSTRING_CHARACTERS = range(20, 161)
_LEFT_OUT = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"),
    *("site-packages", "dist-packages", "__pycache__"),
}
"""Folders of tests, of programs, of old grammars, and of what is installed beside the standard library."""


def docstring_rows(library: Path | None = None) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place of each function, ``file:line``, and its row with a prompt and a completion.

    A row is made of a function that has a body besides its docstring and at most ``CODE_CHARACTERS`` characters, and
    whose docstring begins with a paragraph of 20 to 160 characters that is written as a sentence. Of functions with the
    same code the first one counts.

    Args:
        library: the folder of the standard library; that of this Python if not given.

    Raises:
        DataError: no such function was found, as with a Python whose library has no source files.
    """
    library = library or _standard_library()
    seen: set[str] = set()
    for path in _sources(library):
        for function in ast.walk(_parsed(path)):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) and (sentence := _sentence(function)):
                line = function.lineno
                function.body = function.body[1:]
                code = ast.unparse(function) if function.body else ""
                if code and len(code) <= CODE_CHARACTERS and code not in seen:
                    seen.add(code)
                    place = f"{path.relative_to(library).as_posix()}:{line}"
                    yield place, {"prompt": PROMPT.format(code=code), "completion": sentence}
    if not seen:
        raise DataError(
            f"data = 'docstrings': the standard library in {library} has no source files with docstrings; "
            "give a file of your own with --data"
        )


def docstring_fingerprint() -> str:
    """Return a digest that changes with this Python and with the source files of its library: their names and sizes."""
    library = _standard_library()
    digest = hashlib.sha256(f"{sys.version}:{PROMPT}".encode())
    for path in _sources(library):
        digest.update(f"{path.relative_to(library)}:{path.stat().st_size}".encode())
    return digest.hexdigest()


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _sources(library: Path) -> list[Path]:
    """Return the source files of a library in the order of their names."""
    found = []
    for folder, folders, files in os.walk(library):
        folders[:] = set(folders) - _LEFT_OUT  # os.walk does not enter what is taken out here
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


def _parsed(path: Path) -> ast.Module:
    """Return a file's syntax tree; an empty one if it is not text or not Python of this version."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in old string literals
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # ValueError: null bytes
        return ast.Module(body=[], type_ignores=[])


def _sentence(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return the first paragraph of a docstring on one line, if it is written as a sentence of the right length."""
    paragraph = " ".join((ast.get_docstring(function) or "").split("\n\n")[0].split())
    written = paragraph[:1].isupper() and paragraph.endswith(".")
    return paragraph if written and len(paragraph) in _DOCSTRING_CHARACTERS else ""
