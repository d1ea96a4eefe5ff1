"""Write a C file with the CUDA functions that the stubs do not implement. Each one returns "not supported"."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# The status of each library that means "not supported". NCCL has none, so ncclInvalidUsage is used. For cuFile it is
# CU_FILE_DRIVER_NOT_INITIALIZED, which callers understand as "no GPUDirect Storage on this machine".
_STATUS = (
    (re.compile(r"(__)?cuda[A-Z]"), 801),
    (re.compile(r"cublas"), 15),
    (re.compile(r"cudnn"), 3000),
    (re.compile(r"cusparse"), 10),
    (re.compile(r"cusolver"), 9),
    (re.compile(r"cufft"), 16),
    (re.compile(r"p?nccl"), 5),
    (re.compile(r"cuFile"), 5001),
    (re.compile(r"cu[A-Z]"), 801),
)
_RETURNS_TEXT = re.compile(
    r"\w*(ErrorString|StatusString|StatusName|ErrorName|GetLastError|StatusErrorString)(_v\d+)?$"
)


def not_supported_status(name: str) -> int:
    """Return the status that ``name``'s library uses for "not supported".

    Raises:
        ValueError: the name has the prefix of no CUDA library.
    """
    for pattern, status in _STATUS:
        if pattern.match(name):
            return status
    raise ValueError(f"{name} belongs to no CUDA library")


def write_fallbacks(path: Path, names: Iterable[str], *, header: Path) -> None:
    """Write a C file to ``path`` with one function for each of ``names``."""
    lines = [f'#include "{header}"', ""]
    for name in sorted(names):
        if _RETURNS_TEXT.match(name) and not name.startswith(("cuda", "cuGet")):
            lines.append(f'const char *{name}(void) {{ return dry_not_implemented_text("{name}"); }}')
        else:
            lines.append(f'int {name}(void) {{ return dry_not_implemented("{name}", {not_supported_status(name)}); }}')
    path.write_text("\n".join(lines) + "\n")
