"""A real driver that LD_LIBRARY_PATH puts first, as in many GPU containers, does not take the dry one's place."""

from __future__ import annotations

import importlib
import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram.commands import doctor
from pytest_vram.drygpu.stub.elf import read_dynamic_symbols
from pytest_vram.drygpu.stub.library import ensure_built, find_compiler
from pytest_vram.errors import DryGpuError

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import DryPython

NOT_INITIALIZED = 3

PROGRAM = """
import json, torch
x = torch.ones(1000, device="cuda")
maps = open("/proc/self/maps").read()
print(json.dumps({"allocated": torch.cuda.memory_allocated(), "real": "DECOY/libcuda.so.1" in maps}))
"""


@pytest.fixture(scope="module")
def real_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1 that has every function and answers as a driver does that nobody initialized."""
    try:
        build, compiler = ensure_built(), find_compiler()
    except DryGpuError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("driver")
    known = {name for name in read_dynamic_symbols(build.core).functions if name[:2] == "cu" and name[2].isupper()}
    plain = {name.removesuffix("_v2").removesuffix("_v3") for name in known}
    names = sorted(name + suffix for name in plain for suffix in ("", "_v2", "_v3"))
    (folder / "driver.c").write_text("".join(f"int {name}(void) {{ return {NOT_INITIALIZED}; }}\n" for name in names))
    target = str(folder / "libcuda.so.1")
    how = ["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", str(folder / "driver.c"), "-o", target]
    subprocess.run([*compiler, *how], check=True)
    return folder


def test_the_dry_gpu_asks_its_own_driver(dry_python: DryPython, real_driver: Path) -> None:
    done = dry_python("-c", PROGRAM.replace("DECOY", str(real_driver)), LD_LIBRARY_PATH=str(real_driver))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found == {"allocated": 4096, "real": False}


def test_the_doctor_says_that_the_dry_gpu_works_in_place_of_the_real_one(
    real_driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(real_driver))
    # The package has a function of the module's name.
    module = importlib.import_module("pytest_vram.drygpu.process.activate")
    monkeypatch.setattr(module, "real_gpu_present", lambda: True)
    finding = doctor._try_dry()
    assert finding.works, finding.text
    assert "in place of this machine's own GPU" in finding.text
