"""Find the stub libraries for the installed PyTorch in the user's cache, and compile them if they are not there.

The cache key depends on everything that the libraries are built from. So another version of PyTorch, bitsandbytes or
this package, or another compiler, gets a build of its own, and older builds stay. If two processes need a build at the
same time, one compiles it and the other waits.
"""

from __future__ import annotations

import contextlib
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
        folder: the folder of the libraries, such as ``libcuda.so.1``.
        core: the library to load before PyTorch; it loads the others.
        toolkit: the PyTorch and CUDA that they were built for.
    """

    folder: Path
    core: Path
    toolkit: Toolkit


def cache_folder() -> Path:
    """Return the folder of all builds: ``$PYTEST_VRAM_CACHE``, or ``pytest-vram`` in the user's cache folder."""
    if chosen := os.environ.get("PYTEST_VRAM_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pytest-vram"


def find_compiler() -> tuple[str, ...]:
    """Return the command of the C compiler: ``$CC``, or ``cc``, ``gcc``, ``clang``, or that of the ziglang package.

    Raises:
        DryGpuError: there is no C compiler.
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
    """Return the stub libraries for the installed PyTorch. The first call on a machine compiles them.

    Raises:
        DryGpuError: this is not Linux, there is no CUDA build of PyTorch, the CUDA headers or a compiler are missing,
            or the compiler fails.
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
                    # Imported here, because a start from the cache does not need this module.
                    from pytest_vram.drygpu.stub.compile import compile_stubs

                    compile_stubs(toolkit, compiler, native=NATIVE, core=CORE, folder=folder)
        except OSError as error:
            raise DryGpuError(
                f"the dry GPU cannot be built in {folder.parent}: {error}. "
                "Set PYTEST_VRAM_CACHE to a folder you can write to"
            ) from error
    return Build(folder=folder, core=core, toolkit=toolkit)


def _key(toolkit: Toolkit) -> str:
    """Hash everything that a build depends on. Libraries count by size and time: reading 500 MB takes too long."""
    digest = hashlib.sha256()
    builders = [Path(__file__).with_name(name) for name in ("library.py", "compile.py", "fallback.py", "toolkit.py")]
    for path in (*sorted(NATIVE.rglob("*.[ch]")), *builders):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    cudnn = () if toolkit.cudnn_folder is None else (toolkit.cudnn_folder,)
    for path in (*toolkit.libraries, *toolkit.include, *cudnn):
        status = path.stat()
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    versions = (toolkit.torch_version, toolkit.cuda_version, toolkit.cudnn_version, toolkit.nccl_version)
    digest.update(repr((versions, platform.machine(), os.environ.get("CC"))).encode())
    return f"torch-{toolkit.torch_version}-{digest.hexdigest()[:16]}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # Windows has no such module, and imports this one all the same

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
