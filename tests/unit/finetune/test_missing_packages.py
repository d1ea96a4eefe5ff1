"""The package without its extra: one line that says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
WITHOUT = "import runpy, sys, importlib.util as u; f = u.find_spec\n"
WITHOUT += "u.find_spec = lambda name, *more: None if name in ('yaml', 'tyro') else f(name, *more)\n"


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + program], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("module", ["finetune.qlora", "finetune.ladder"])
def test_a_command_says_what_to_install(module: str) -> None:
    done = run(f"sys.argv = ['-m']; runpy.run_module('{module}', run_name='__main__', alter_sys=True)")
    assert done.returncode == 1
    assert done.stderr == "finetune needs tyro, yaml, not installed here: pip install 'pytest-vram[finetune]'\n"


def test_an_import_is_an_import_error() -> None:
    done = run("import finetune")
    assert done.stderr.splitlines()[-1].startswith("ImportError: finetune needs tyro, yaml, not installed here")
