"""Find the installed CUDA build of PyTorch, and the CUDA functions that the dry GPU has to replace."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from pytest_vram.drygpu.stub.elf import ElfError, read_dynamic_symbols
from pytest_vram.errors import DryGpuError

_REPLACED = re.compile(r"lib(cudart|cublas|cublasLt|cudnn|cusparse|cusparseLt|cusolver|cufft|nccl|cufile)\.so\.\d+")
_ALWAYS = ("libcuda.so.1", "libnvidia-ml.so.1")
_CUDA_SYMBOL = re.compile(
    r"(__cuda[A-Z]|cuda[A-Z]|cublas|cudnn|cusparse|cusolver|cufft|nccl[A-Z]|pnccl[A-Z]|cuFile)\w*"
)
_DRIVER_FUNCTION = re.compile(
    r"\bCUDAAPI\s+(cu[A-Z]\w*)\s*\(|#\s*define\s+cu[A-Z]\w*\s+(?:__CUDA_API_\w+\()?(cu[A-Z]\w*_v\d+)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolkit:
    """One installed CUDA build of PyTorch, with the headers that belong to it.

    Attributes:
        torch_version: for example ``"2.14.1+cu130"``.
        cuda_version: for example ``"13.0"``.
        libraries: the libraries that call CUDA: those of PyTorch and of bitsandbytes.
        include: folders with ``cuda_runtime_api.h`` and ``cuda.h``.
        library_folders: folders of the real CUDA libraries, whose functions the stubs replace.
        cudnn_version: as ``cudnnGetVersion()`` reports it, 92400 for 9.24.0.
        cudnn_folder: where the libraries of cuDNN are, ``None`` where there is no wheel of it.
        nccl_version: as ``ncclGetVersion()`` reports it, 22703 for 2.27.3.
    """

    torch_version: str
    cuda_version: str
    libraries: tuple[Path, ...]
    include: tuple[Path, ...]
    library_folders: tuple[Path, ...]
    cudnn_version: int
    cudnn_folder: Path | None
    nccl_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """The libraries and functions that the stubs replace.

    Attributes:
        names: names of the libraries, as programs are linked against them.
        functions: every function that a program may call in them.
    """

    names: tuple[str, ...]
    functions: frozenset[str]


def find_toolkit() -> Toolkit:
    """Find the CUDA build of PyTorch that ``import torch`` would import, without importing it.

    Raises:
        DryGpuError: PyTorch is not installed, is not a CUDA build, or its CUDA headers are not installed.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise DryGpuError("the dry GPU needs PyTorch, which is not installed: pip install torch")
    root = Path(spec.origin).parent
    text = (root / "version.py").read_text(encoding="utf-8")
    version = _assigned(text, "__version__")
    cuda = _assigned(text, "cuda")
    if cuda is None or not (root / "lib" / "libtorch_cuda.so").exists():
        raise DryGpuError(
            f"the dry GPU needs a CUDA build of PyTorch; torch {version} in {root} has none. On Linux, plain "
            "`pip install torch` installs one (no GPU needed); the CPU build comes from download.pytorch.org/whl/cpu"
        )
    site = root.parent
    libraries = [path for path in sorted((root / "lib").glob("*.so")) if "torch" in path.name or "c10" in path.name]
    major = cuda.split(".")[0]
    libraries += sorted((site / "bitsandbytes").glob(f"libbitsandbytes_cuda{major}[0-9].so"))
    return Toolkit(
        torch_version=version or "unknown",
        cuda_version=cuda,
        libraries=tuple(libraries),
        include=_find_headers(site, cuda),
        library_folders=(*sorted((site / "nvidia").glob("*/lib")), root / "lib"),
        cudnn_version=_wheel_version(site, f"nvidia_cudnn_cu{major}", default=91000),
        cudnn_folder=cudnn if (cudnn := site / "nvidia" / "cudnn" / "lib").is_dir() else None,
        nccl_version=_wheel_version(site, f"nvidia_nccl_cu{major}", default=22700),
    )


def _assigned(text: str, name: str) -> str | None:
    match = re.search(rf"^{name}\s*(?::[^=]+)?=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def _wheel_version(site: Path, distribution: str, *, default: int) -> int:
    """Return the version of a wheel: 92400 for "9.24.0.43". Without a wheel, as with conda, return ``default``.

    PyTorch only compares the number, so any recent version is good enough.
    """
    for folder in site.glob(f"{distribution}-*.dist-info"):
        found = re.match(r"-(\d+)\.(\d+)\.(\d+)", folder.name.removeprefix(distribution))
        if found:
            return int(found[1]) * 10000 + int(found[2]) * 100 + int(found[3])
    return default


def _find_headers(site: Path, cuda: str) -> tuple[Path, ...]:
    major = cuda.split(".")[0]
    places = [site / "nvidia" / f"cu{major}" / "include", site / "nvidia" / "cuda_runtime" / "include"]
    homes = [os.environ[variable] for variable in ("CUDA_HOME", "CUDA_PATH") if variable in os.environ]
    places += [
        *(Path(home) / "include" for home in homes),
        Path(f"/usr/local/cuda-{cuda}/include"),
        Path("/usr/local/cuda/include"),
    ]
    for place in places:
        runtime = place / "cuda_runtime_api.h"
        if not runtime.exists() or not (place / "cuda.h").exists():
            continue
        found = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", runtime.read_text(encoding="utf-8", errors="replace"))
        if found and int(found[1]) // 1000 == int(major):
            return (place,)
    package = "nvidia-cuda-runtime" if int(major) >= 13 else f"nvidia-cuda-runtime-cu{major}"
    raise DryGpuError(
        f"the headers of CUDA {cuda} are not installed, and the dry GPU is compiled against them: "
        f"pip install {package}=={cuda}.*   (looked in {', '.join(map(str, places))})"
    )


def read_surface(toolkit: Toolkit) -> Surface:
    """Read from the installed libraries which functions the dry GPU may be asked for. This takes one or two seconds."""
    names: set[str] = set()
    functions: set[str] = set()
    for path in toolkit.libraries:
        symbols = read_dynamic_symbols(path)
        names.update(name for name in symbols.needed if _REPLACED.fullmatch(name))
        functions.update(name for name in symbols.undefined if _CUDA_SYMBOL.fullmatch(name))
    for name in sorted(names):
        for folder in toolkit.library_folders:
            if (folder / name).exists():
                try:
                    exported = read_dynamic_symbols(folder / name).functions
                except ElfError:
                    continue
                functions.update(symbol for symbol in exported if _CUDA_SYMBOL.fullmatch(symbol))
                break
    header = (toolkit.include[0] / "cuda.h").read_text(encoding="utf-8", errors="replace")
    for plain, versioned in _DRIVER_FUNCTION.findall(header):
        functions.add(plain or versioned)
    return Surface(names=tuple(sorted({*names, *_ALWAYS})), functions=frozenset(functions))
