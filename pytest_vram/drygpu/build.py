"""Compiles the stub libraries beneath the dry GPU, once for each installed PyTorch, into the user's cache.

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
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vram.drygpu.elf import read_dynamic_symbols
from pytest_vram.drygpu.fallback import write_fallbacks
from pytest_vram.drygpu.toolkit import Surface, Toolkit, find_toolkit, read_surface
from pytest_vram.errors import DryGpuError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NATIVE = Path(__file__).parent / "native"
CORE = "libpytest_vram_dry.so"
_FLAGS = ("-std=gnu11", "-D_GNU_SOURCE", "-O1", "-fPIC", "-w", "-Wl,-Bsymbolic")


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
    if not core.exists():
        compiler = find_compiler()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder.parent / f"{folder.name}.lock"):
                if not core.exists():
                    _build(toolkit, compiler, folder)
        except OSError as error:
            raise DryGpuError(
                f"the dry GPU cannot be built in {folder.parent}: {error}. "
                "Set PYTEST_VRAM_CACHE to a folder you can write to"
            ) from error
    return Build(folder=folder, core=core, toolkit=toolkit)


def _key(toolkit: Toolkit) -> str:
    """Hash what goes in. Libraries by size and time: reading 500 MB of them would cost more than the whole start."""
    digest = hashlib.sha256()
    builders = [NATIVE.parent / name for name in ("build.py", "fallback.py", "toolkit.py")]
    for path in (*sorted(NATIVE.rglob("*.[ch]")), *builders):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for path in (*toolkit.libraries, *toolkit.include):
        status = path.stat()
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    compiler = os.environ.get("CC", "")
    digest.update(
        f"{toolkit.torch_version}\0{toolkit.cuda_version}\0{toolkit.cudnn_version}\0{toolkit.nccl_version}\0{platform.machine()}\0{compiler}".encode()
    )
    return f"torch-{toolkit.torch_version}-{digest.hexdigest()[:16]}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(toolkit: Toolkit, compiler: Sequence[str], folder: Path) -> None:
    surface = read_surface(toolkit)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _compile(toolkit, surface, compiler, work)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compile(toolkit: Toolkit, surface: Surface, compiler: Sequence[str], work: Path) -> None:
    versions = [f"-DDRY_CUDNN_VERSION={toolkit.cudnn_version}", f"-DDRY_NCCL_VERSION={toolkit.nccl_version}"]
    include = [*versions, f"-I{NATIVE}", f"-I{NATIVE / 'shim'}", *(f"-I{path}" for path in toolkit.include)]

    def compile_one(source: Path) -> Path:
        target = work / f"{source.stem}.o"
        _run([*compiler, *_FLAGS, *include, "-c", str(source), "-o", str(target)], toolkit)
        return target

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, sorted(NATIVE.glob("*.c"))))
    core = work / CORE
    link = [
        *compiler,
        "-shared",
        "-fPIC",
        "-Wl,-Bsymbolic",
        f"-Wl,-soname,{CORE}",
        "-Wl,-rpath,$ORIGIN",
        "-Wl,--no-as-needed",
    ]
    _run([*link, *map(str, objects), "-o", str(core), "-ldl", "-lpthread"], toolkit)

    # What is defined by now is real; everything else that may be asked for says that it is not here.
    fallbacks = work / "fallbacks.c"
    write_fallbacks(fallbacks, surface.functions - read_dynamic_symbols(core).functions, header=NATIVE / "dry.h")
    objects.append(compile_one(fallbacks))
    _run([*link, *map(str, objects), "-o", str(core), "-ldl", "-lpthread"], toolkit)

    # Each name is an empty library that leads to the core, and the core leads to them: loading it puts all in place.
    empty = work / "empty.c"
    empty.write_text("")
    names = [work / name for name in surface.names]
    shared = [*compiler, "-shared", "-fPIC", "-Wl,-rpath,$ORIGIN", "-Wl,--no-as-needed", str(empty), str(core)]
    for name in names:
        _run([*shared, f"-Wl,-soname,{name.name}", "-o", str(name)], toolkit)
    complete = work / "complete.so"
    _run([*link, *map(str, objects), *map(str, names), "-o", str(complete), "-ldl", "-lpthread"], toolkit)
    os.replace(complete, core)
    for path in (*objects, empty, fallbacks):
        path.unlink()


def _run(command: Sequence[str], toolkit: Toolkit) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_plain_environment())
    except OSError as error:
        raise DryGpuError(f"the dry GPU could not run its compiler {command[0]}: {error}") from error
    if done.returncode != 0:
        raise DryGpuError(
            f"the dry GPU could not be compiled for torch {toolkit.torch_version} (CUDA {toolkit.cuda_version}):\n"
            f"$ {' '.join(command)}\n{done.stderr.strip()}"
        )


def _plain_environment() -> dict[str, str]:
    """A compiler must not itself run on top of the stubs."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
