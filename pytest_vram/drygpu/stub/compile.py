"""Compile the stub libraries of the dry GPU: its C files, and a fallback for every CUDA function they lack."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vram.drygpu.stub.elf import read_dynamic_symbols
from pytest_vram.drygpu.stub.fallback import write_fallbacks
from pytest_vram.drygpu.stub.toolkit import Toolkit, read_surface
from pytest_vram.errors import DryGpuError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# By default, zig compiles undefined behaviour to calls of a runtime that a shared library does not contain.
_FLAGS = ("-std=gnu11", "-D_GNU_SOURCE", "-O1", "-fPIC", "-w", "-fno-sanitize=undefined")
# DT_RPATH is searched before LD_LIBRARY_PATH, which contains the real libcuda.so.1 in many GPU containers.
_RUN_PATH = ("-Wl,-rpath,$ORIGIN", "-Wl,--disable-new-dtags")
_LINK = ("-shared", "-fPIC", "-Wl,-Bsymbolic", *_RUN_PATH, "-Wl,--no-as-needed")
_LIBRARIES = ("-ldl", "-lpthread")


def compile_stubs(toolkit: Toolkit, compiler: Sequence[str], *, native: Path, core: str, folder: Path) -> None:
    """Compile the C files of ``native`` for one PyTorch into ``folder``, which is created atomically.

    Args:
        core: name of the library that contains all functions; loading it loads the other libraries too.

    Raises:
        DryGpuError: the compiler cannot be run, or fails; the message quotes it.
    """
    surface = read_surface(toolkit)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _Compiler(toolkit, compiler, native, work).build(core, surface.names, surface.functions)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class _Compiler:
    def __init__(self, toolkit: Toolkit, command: Sequence[str], native: Path, work: Path) -> None:
        self.toolkit = toolkit
        self.command = command
        self.native = native
        self.work = work
        versions = (
            f"-DDRY_CUDNN_VERSION={toolkit.cudnn_version}",
            f'-DDRY_CUDNN_FOLDER="{toolkit.cudnn_folder or ""}"',
            f"-DDRY_NCCL_VERSION={toolkit.nccl_version}",
        )
        include = (native, native / "shim", *toolkit.include)
        self.flags = (*_FLAGS, *versions, *(f"-I{path}" for path in include))

    def build(self, core: str, names: Sequence[str], functions: frozenset[str]) -> None:
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            objects = list(pool.map(self.compile, sorted(self.native.glob("*.c"))))
        real = self.link("real.so", core, objects)

        # The functions in `real` are implemented. Every other one gets a fallback that reports "not supported".
        fallbacks = self.work / "fallbacks.c"
        write_fallbacks(fallbacks, functions - read_dynamic_symbols(real).functions, header=self.native / "dry.h")
        objects.append(self.compile(fallbacks))

        # Each name is an empty library that depends on the core. The core depends on them, so loading it loads all.
        without_names = self.link(core, core, objects)
        empty = self.work / "empty.c"
        empty.write_text("")
        doors = [self.link(name, name, [empty, without_names]) for name in names]
        complete = self.link("complete.so", core, [*objects, *doors])
        os.replace(complete, self.work / core)
        # Triton before 3.3 (torch 2.6) links its launcher with -lcuda, for which linkers look under this name.
        (self.work / "libcuda.so").symlink_to("libcuda.so.1")
        for path in (*objects, empty, fallbacks, real):
            path.unlink()

    def compile(self, source: Path) -> Path:
        target = self.work / f"{source.stem}.o"
        self.run([*self.command, *self.flags, "-c", str(source), "-o", str(target)])
        return target

    def link(self, file: str, soname: str, inputs: Iterable[Path]) -> Path:
        target = self.work / file
        self.run([*self.command, *_LINK, f"-Wl,-soname,{soname}", *map(str, inputs), "-o", str(target), *_LIBRARIES])
        return target

    def run(self, command: Sequence[str]) -> None:
        # The compiler must not load the stub libraries.
        variables = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
        except OSError as error:
            raise DryGpuError(f"the dry GPU could not run its compiler {command[0]}: {error}") from error
        if done.returncode != 0:
            raise DryGpuError(
                f"the dry GPU could not be compiled for torch {self.toolkit.torch_version} "
                f"(CUDA {self.toolkit.cuda_version}):\n$ {' '.join(command)}\n{done.stderr.strip()}"
            )
