"""Finds the stub libraries for the installed PyTorch in the user's cache, or has them compiled into it, once.

The cache's key covers everything that goes into the libraries, so a new PyTorch, bitsandbytes, compiler or version of
this package gets libraries of its own, and an old one keeps its. Two processes may build at the same time: one builds,
the other waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vram.drygpu.stub.toolkit import Toolkit, find_toolkit
from pytest_vram.errors import DryGpuError

if TYPE_CHECKING:
    from collections.abc import Iterator

NATIVE = Path(__file__).parents[1] / "native"
CORE = "libpytest_vram_dry.so"


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """The compiled stubs of one PyTorch.

    Attributes:
        folder: where they are. ``libcuda.so.1`` and its like are in it, in front of everything that looks for them.
        core: the library to load before PyTorch; it brings the others.
        toolkit: what they were built for.
    """

    folder: Path
    core: Path
    toolkit: Toolkit


def cache_folder() -> Path:
    """Return where builds are kept: ``$PYTEST_VRAM_CACHE``, else ``pytest-vram`` in the user's cache folder."""
    if chosen := os.environ.get("PYTEST_VRAM_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pytest-vram"


def find_compiler() -> tuple[str, ...]:
    """Return the C compiler's command: ``$CC``, else ``cc``, ``gcc`` or ``clang``, else the one in the ziglang package.

    Raises:
        DryGpuError: there is none.
    """
    if chosen := os.environ.get("CC"):
        command = tuple(chosen.split())
        if shutil.which(command[0]) is None:
            raise DryGpuError(f"CC={chosen}: there is no such compiler; unset CC to let one be found")
        return command
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return (found,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "cc")
    raise DryGpuError(
        "the dry GPU is compiled once on each machine and found no C compiler: no cc, gcc or clang on PATH. "
        "Either `pip install ziglang` (a compiler in a wheel, no root needed), or install gcc "
        "(Debian, Ubuntu: apt install gcc libc6-dev), or set CC"
    )


def ensure_built() -> Build:
    """Return the stubs for the installed PyTorch, compiling them if this is the first time.

    Raises:
        DryGpuError: not on Linux, no CUDA build of PyTorch, no headers, no compiler, or a compiler that fails.
    """
    if sys.platform != "linux":
        raise DryGpuError(
            f"the dry GPU needs Linux, for it stands in for Linux's CUDA libraries; this is {sys.platform}"
        )
    toolkit = find_toolkit()
    folder = cache_folder() / "drygpu" / _key(toolkit)
    core = folder / CORE
    if set(" :") & set(str(core)):
        raise DryGpuError(
            f"the dry GPU cannot live in {folder.parent}: LD_PRELOAD takes a path with a space or a colon for two. "
            "Set PYTEST_VRAM_CACHE to a folder without either"
        )
    if not core.exists():
        compiler = find_compiler()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder.parent / f"{folder.name}.lock"):
                if not core.exists():
                    # Here, for it brings in much that a start from the cache does without.
                    from pytest_vram.drygpu.stub.compile import compile_stubs

                    compile_stubs(toolkit, compiler, native=NATIVE, core=CORE, folder=folder)
        except OSError as error:
            raise DryGpuError(
                f"the dry GPU cannot be built in {folder.parent}: {error}. "
                "Set PYTEST_VRAM_CACHE to a folder you can write to"
            ) from error
    return Build(folder=folder, core=core, toolkit=toolkit)


def _key(toolkit: Toolkit) -> str:
    """Hash what goes in. Libraries by size and time: reading 500 MB of them would cost more than the whole start."""
    digest = hashlib.sha256()
    builders = [Path(__file__).with_name(name) for name in ("library.py", "compile.py", "fallback.py", "toolkit.py")]
    for path in (*sorted(NATIVE.rglob("*.[ch]")), *builders):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for path in (*toolkit.libraries, *toolkit.include):
        status = path.stat()
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    versions = (toolkit.torch_version, toolkit.cuda_version, toolkit.cudnn_version, toolkit.nccl_version)
    digest.update(repr((versions, platform.machine(), os.environ.get("CC"))).encode())
    return f"torch-{toolkit.torch_version}-{digest.hexdigest()[:16]}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
