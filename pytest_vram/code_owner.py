"""Tell whose line of code this is: the user's, a library's, or that of torch, Python and this package between them."""

from __future__ import annotations

import functools
import os
import re
import sysconfig
from typing import TYPE_CHECKING, Literal, NamedTuple

from pytest_vram.memory.code_names import code_name, is_typed_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import FrameType

Owner = Literal["user", "library", "torch", "own"]

_LIBRARIES = tuple(
    sorted({os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("purelib", "platlib")}, key=len)
)
_OTHER_LIBRARIES = re.compile(rf".*{re.escape(os.sep)}(?:site|dist)-packages{re.escape(os.sep)}")
"""The folders of packages that were installed for one user, or that a virtual environment sees in the system."""
_STANDARD = os.path.realpath(sysconfig.get_path("stdlib")) + os.sep
_OWN = os.path.dirname(os.path.realpath(__file__)) + os.sep


class Frame(NamedTuple):
    """One frame of a stack."""

    filename: str
    line: int
    function: str

    @property
    def place(self) -> str:
        """Return ``file:line``, as reports show it."""
        return f"{shown(self.filename)}:{self.line}"


class Innermost(NamedTuple):
    """The innermost frame of each owner in a stack, this package excepted; None if there is none.

    Frames outside of the user's innermost frame are not looked at.
    """

    user: Frame | None
    library: Frame | None
    torch: Frame | None


def frames(innermost: FrameType | None) -> Iterator[Frame]:
    """Yield a running frame and those that called it."""
    while innermost is not None:
        yield Frame(innermost.f_code.co_filename, innermost.f_lineno, innermost.f_code.co_name)
        innermost = innermost.f_back


def innermost(stack: Iterable[Frame]) -> Innermost:
    """Find whose code made a call.

    Args:
        stack: frames, the innermost first. It is read no further than to the user's innermost frame.
    """
    found: dict[Owner, Frame] = {}
    for frame in stack:
        kind = owner(frame.filename)
        found.setdefault(kind, frame)
        if kind == "user":
            break
    return Innermost(found.get("user"), found.get("library"), found.get("torch"))


@functools.cache
def owner(filename: str) -> Owner:
    """Return who owns a file.

    ``torch`` stands for torch, the standard library and generated code, which lie between a program and its libraries.
    ``own`` is this package. A name in angle brackets has no file: the user typed the code in, or a program made it.
    """
    if filename.startswith("<"):
        return "user" if filename == "<string>" or is_typed_in(filename) else "torch"
    path = os.path.realpath(filename)
    if path.startswith(_OWN):
        return "own"
    folder = _library_folder(path)
    if folder:
        return "torch" if path.startswith(f"{folder}torch{os.sep}") else "library"
    return "torch" if path.startswith(_STANDARD) else "user"


def shown(filename: str) -> str:
    """Return a file's path below the libraries' folder (``peft/model.py``) or the working directory (``train.py``).

    A notebook's cell has its own name.
    """
    if (name := code_name(filename)) is not None:
        return name
    if filename.startswith("<"):
        return filename
    path = os.path.realpath(filename)
    return path.removeprefix(_library_folder(path) or os.path.join(os.getcwd(), ""))


def _library_folder(path: str) -> str:
    """Return the folder of installed packages that a file is in; the empty text if it is in none."""
    for folder in _LIBRARIES:
        if path.startswith(folder):
            return folder
    found = _OTHER_LIBRARIES.match(path)
    return found[0] if found else ""
