"""The command ``python -m pytest_vram doctor``: show which probes work on this machine, and why others do not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from pytest_vram import __version__
from pytest_vram.errors import DryGpuError
from pytest_vram.probe.select import DEFAULT_CARD

if TYPE_CHECKING:
    import argparse

_PACKAGES = ("pytest", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "triton", "nvidia-ml-py")
_TRIAL = "import torch; torch.ones(1000, device='cuda'); print(torch.cuda.max_memory_allocated())"
_OTHERS = """
import torch
if torch.version.hip and torch.cuda.is_available():
    print(f"cuda: {torch.cuda.get_device_name()}, with ROCm {torch.version.hip}")
elif torch.backends.mps.is_available():
    print("mps: an Apple GPU, sampled after each operator")
elif hasattr(torch, "accelerator") and torch.accelerator.is_available():
    print(f"accelerator: {torch.accelerator.current_accelerator()}, by PyTorch's own counters")
else:
    raise SystemExit(1)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the output; ``works`` is ``None`` if the line only informs."""

    subject: str
    works: bool | None
    text: str


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``doctor`` to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="say what is on this machine and which probes work",
        description="Say what is on this machine, which probes work, and why the others do not.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Print the checks; return 0 if a probe works, otherwise 1."""
    checks = examine()
    if args.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        marks = {True: "yes", False: "no", None: ""}
        for check in checks:
            print(f"{check.subject:<18} {marks[check.works]:<4} {check.text}")
    return 0 if any(check.works for check in checks if check.subject.startswith("probe ")) else 1


def examine() -> list[Check]:
    """Return all checks. It takes some seconds, because each probe is tried in a separate process."""
    installed = {name: _version(name) for name in _PACKAGES}
    there = ", ".join(f"{name} {version}" for name, version in installed.items() if version is not None)
    missing = ", ".join(name for name, version in installed.items() if version is None)
    return [
        Check(subject="python", works=None, text=f"{sys.version.split()[0]}, {platform.platform()}"),
        Check(subject="pytest-vram", works=None, text=__version__),
        Check(subject="packages", works=None, text=there + (f"; not installed: {missing}" if missing else "")),
        *_dry_gpu_parts(),
        _try_cuda(installed["torch"]),
        _try_dry(),
        _try_nvml(installed["nvidia-ml-py"]),
        _try_host(installed["torch"]),
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _dry_gpu_parts() -> list[Check]:
    from pytest_vram.drygpu.stub.library import cache_folder, find_compiler
    from pytest_vram.drygpu.stub.toolkit import find_toolkit

    checks = []
    try:
        toolkit = find_toolkit()
        text = f"torch {toolkit.torch_version}, CUDA {toolkit.cuda_version}"
        checks.append(Check(subject="CUDA build", works=True, text=text))
    except DryGpuError as error:
        checks.append(Check(subject="CUDA build", works=False, text=str(error)))
    try:
        checks.append(Check(subject="C compiler", works=True, text=" ".join(find_compiler())))
    except DryGpuError as error:
        checks.append(Check(subject="C compiler", works=False, text=str(error)))
    folder = cache_folder() / "drygpu"
    builds = [entry for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    built = f"{len(builds)} build{'s' if len(builds) != 1 else ''} of the stub libraries in {folder}"
    return [*checks, Check(subject="stub cache", works=bool(builds), text=built)]


def _python(code: str, *, environment: dict[str, str] | None = None) -> tuple[bool, str]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
    except subprocess.TimeoutExpired:
        return False, "no answer within 300 s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit code {done.returncode}"


def _try_cuda(torch: str | None) -> Check:
    from pytest_vram.drygpu.driver import is_active
    from pytest_vram.drygpu.process.activate import real_gpu_present

    subject = "probe cuda"
    if torch is None:
        return Check(subject=subject, works=False, text="torch is not installed: pip install torch")
    if is_active():
        return Check(subject=subject, works=False, text="this process has dry GPUs; ask in one that has none")
    if not real_gpu_present():
        return _try_others()
    works, text = _python("import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else exit(1))")
    return Check(subject=subject, works=works, text=text if works else f"there is a GPU that torch cannot use: {text}")


def _try_others() -> Check:
    """Say which device of another maker torch sees, on a machine without one of NVIDIA's."""
    works, text = _python(_OTHERS)
    if works:
        return Check(subject=f"probe {text.partition(':')[0]}", works=True, text=text)
    return Check(subject="probe cuda", works=False, text="this machine has no GPU that torch can use")


def _try_dry() -> Check:
    from pytest_vram.drygpu.process.activate import environment, real_gpu_present

    subject = "probe dry"
    began = time.monotonic()
    try:
        variables = environment(DEFAULT_CARD, replace_real_gpu=True)
    except DryGpuError as error:
        return Check(subject=subject, works=False, text=str(error))
    works, text = _python(_TRIAL, environment=variables)
    if works:
        instead = ", in place of this machine's own GPU" if real_gpu_present() else ""
        seconds = time.monotonic() - began
        text = f"pytest --vram-gpu=dry:{DEFAULT_CARD} and `run` work{instead}; tried in {seconds:.1f} s"
    return Check(subject=subject, works=works, text=text)


def _try_nvml(installed: str | None) -> Check:
    subject = "probe nvml"
    if installed is None and importlib.util.find_spec("pynvml") is None:
        return Check(subject=subject, works=False, text="pynvml is not installed: pip install pytest-vram[nvml]")
    works, text = _python("import pynvml; pynvml.nvmlInit(); print(pynvml.nvmlDeviceGetCount(), 'device(s)')")
    return Check(subject=subject, works=works, text=text)


def _try_host(torch: str | None) -> Check:
    if torch is None:
        return Check(subject="probe host", works=False, text="torch is not installed: pip install torch")
    return Check(
        subject="probe host", works=True, text="CPU tensors are traced: figures are tensor bytes, not reserved"
    )
