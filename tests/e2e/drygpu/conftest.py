"""Programs on a dry GPU, each in a process of its own; a file of checks shares one process, for imports are dear."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_vram.drygpu import environment
from pytest_vram.drygpu.process.startup import inherited
from pytest_vram.errors import DryGpuError

PROGRAMS = Path(__file__).parent / "programs"

DryPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def dry_python() -> DryPython:
    """Runs Python on dry GPUs: ``dry_python("-c", code, gpu="l4", count=2, CUDA_VISIBLE_DEVICES="1")``."""

    def run(*args: str, gpu: str = "rtx-4090", count: int = 1, **more: str) -> subprocess.CompletedProcess[str]:
        try:
            variables = environment(gpu, count=count, replace_real_gpu=True)
        except DryGpuError as error:
            pytest.skip(str(error))
        variables.update(inherited(variables))
        variables.update(more, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
        return subprocess.run(
            [sys.executable, "-W", "ignore", *args],
            env=variables,
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def run_program(dry_python: DryPython) -> Callable[..., dict[str, Any]]:
    """Runs a file of ``programs`` and returns the JSON on the last line that it prints."""

    def run(name: str, *args: str, **options: Any) -> dict[str, Any]:
        done = dry_python(str(PROGRAMS / name), *args, **options)
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found

    return run


@pytest.fixture(scope="session")
def run_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``python -m pytest_vram run`` and what follows it, as a user would."""

    def run(*args: str, timeout: float = 1800, **more: str) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **more}
        return subprocess.run(
            [sys.executable, "-m", "pytest_vram", "run", *args],
            env=variables,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
