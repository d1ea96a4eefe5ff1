"""Building the stubs: where to, with what, once, and what is said when it cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pytest_vram.drygpu.stub import library
from pytest_vram.drygpu.stub.toolkit import find_toolkit
from pytest_vram.errors import DryGpuError


@pytest.fixture
def _cuda_build() -> None:
    try:
        find_toolkit()
    except DryGpuError as error:
        pytest.skip(str(error))


def test_the_cache_goes_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("PYTEST_VRAM_CACHE", raising=False)
    assert library.cache_folder() == tmp_path / "xdg" / "pytest-vram"
    monkeypatch.setenv("PYTEST_VRAM_CACHE", str(tmp_path / "own"))
    assert library.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("PYTEST_VRAM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert library.cache_folder() == tmp_path / ".cache" / "pytest-vram"


def test_without_a_compiler_the_message_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DryGpuError, match="no C compiler") as caught:
        library.find_compiler()
    assert "pip install ziglang" in str(caught.value)


def test_a_chosen_compiler_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-cc -m64")
    with pytest.raises(DryGpuError, match="CC=no-such-cc -m64"):
        library.find_compiler()


@pytest.mark.usefixtures("_cuda_build")
def test_a_program_can_be_linked_with_lcuda(tmp_path: Path) -> None:
    source = tmp_path / "launcher.c"
    source.write_text("int cuInit(unsigned);\nint start(void) { return cuInit(0); }\n")
    folder = library.ensure_built().folder
    command = [*library.find_compiler(), "-shared", "-fPIC", str(source), "-o", str(tmp_path / "launcher.so")]
    subprocess.run([*command, f"-L{folder}", "-lcuda"], check=True)


@pytest.mark.usefixtures("_cuda_build")
def test_a_failing_compiler_is_quoted_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'this compiler is on strike' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("PYTEST_VRAM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DryGpuError, match="this compiler is on strike"):
        library.ensure_built()
    assert [path.name for path in (tmp_path / "cache" / "drygpu").iterdir() if path.suffix != ".lock"] == []


@pytest.mark.usefixtures("_cuda_build")
def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("PYTEST_VRAM_CACHE", str(blocked))
    with pytest.raises(DryGpuError, match="Set PYTEST_VRAM_CACHE"):
        library.ensure_built()


@pytest.mark.usefixtures("_cuda_build")
@pytest.mark.parametrize("name", ["my cache", "a:b"])
def test_a_path_that_ld_preload_would_split_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv("PYTEST_VRAM_CACHE", str(tmp_path / name))
    with pytest.raises(DryGpuError, match="LD_PRELOAD") as caught:
        library.ensure_built()
    assert name in str(caught.value)


@pytest.mark.usefixtures("_cuda_build")
def test_two_processes_build_at_once_and_a_third_finds_it_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTEST_VRAM_CACHE", str(tmp_path))
    program = "from pytest_vram.drygpu.stub.library import ensure_built; print(ensure_built().core)"
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    cores = {out.strip() for out, _ in outputs}
    assert len(cores) == 1
    core = Path(cores.pop())
    built = core.stat().st_mtime_ns
    assert [path.name for path in core.parent.parent.iterdir() if path.is_dir()] == [core.parent.name]

    assert library.ensure_built().core == core
    assert core.stat().st_mtime_ns == built
    names = {path.name for path in core.parent.iterdir()}
    assert {"libcuda.so.1", "libnvidia-ml.so.1", library.CORE} <= names
    assert (core.parent / "libcuda.so").samefile(core.parent / "libcuda.so.1")  # for -lcuda
    assert not [name for name in names if name.endswith((".o", ".c"))]
