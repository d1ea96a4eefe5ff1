"""What others decide: cuDNN's workspaces and recurrent layers, torch.compile's choices, the driver's own memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram.drygpu import environment
from pytest_vram.drygpu.stub.library import cache_folder, ensure_built
from pytest_vram.errors import DryGpuError

if TYPE_CHECKING:
    from pytest_vram.drygpu.stub.toolkit import Toolkit

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def library(run_program: Run) -> Run:
    """Runs one check of programs/libraries.py."""
    return lambda name, **more: run_program("libraries.py", name, **more)


@pytest.fixture(scope="module")
def builds() -> Toolkit:
    """What the stubs are built for; without it there is no dry GPU."""
    try:
        return ensure_built().toolkit
    except DryGpuError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def asks_cudnn(builds: Toolkit) -> None:
    """The tests that use it want a cuDNN that can be asked without a device."""
    toolkit = builds
    if toolkit.cudnn_folder is None or toolkit.cudnn_version < 91100:
        pytest.skip(f"cuDNN {toolkit.cudnn_version} is not asked without a device")


def noted(found: dict[str, Any], text: str) -> bool:
    return any(text in note for note in found["notes"])


@pytest.mark.usefixtures("asks_cudnn")
def test_a_convolution_takes_the_workspace_of_cudnn_s_own_plan(library: Run) -> None:
    found = library("convolutions", gpu="h200")
    # Both layouts of the images, and more: fp32 is computed channels last.
    assert found["forward"] > 8 * 64 * 56 * 56 * 4
    assert not noted(found, "counted as 0 bytes")
    assert noted(found, "weight gradients in fp32")
    assert noted(found, "cuDNN convolutions: ")
    assert found["missing"] == []


@pytest.mark.usefixtures("asks_cudnn")
def test_weight_gradients_are_told_of_only_where_they_were_measured(library: Run) -> None:
    found = library("convolutions", gpu="rtx-4090")
    assert found["forward"] > 0
    assert not noted(found, "weight gradients")
    assert noted(found, "cuDNN convolutions: "), "on no card cuDNN's choice is certain"


@pytest.mark.usefixtures("asks_cudnn")
def test_a_weight_gradient_in_parts_has_the_workspace_that_was_measured(library: Run, builds: Toolkit) -> None:
    if builds.cudnn_version not in (91900, 92400):
        pytest.skip(f"which plan cuDNN {builds.cudnn_version} takes is not known here")
    images, weight = 32 * 512 * 28 * 28 * 4, 512 * 512 * 3 * 3 * 4
    # The images, their gradient and the weight channels last, and a weight of partial sums: 116 MiB on an H200.
    found = library("weight_gradient", gpu="h200")["workspace"]
    assert 0 <= found - 2 * (images + weight) < 4096


def test_cudnn_is_kept_out_by_a_variable_and_the_run_says_so(library: Run) -> None:
    found = library("convolutions", gpu="h200", PYTEST_VRAM_CUDNN="off")
    assert found["forward"] == 0
    assert noted(found, "cuDNN execution plans: their workspace is not known and counted as 0 bytes")


@pytest.mark.usefixtures("asks_cudnn")
def test_a_choice_by_timing_is_told_and_the_same_each_time(library: Run) -> None:
    first, second = library("benchmarked", gpu="a100-80"), library("benchmarked", gpu="a100-80")
    assert noted(first, "cuDNN plans were timed")
    assert first == second


# Workspace and reserve that cuDNN 9.19 names for a plain layer of 128 x 32 rows, 512 in and 1024 out; output and state.
PLAIN_BYTES = 99222016 + 16777472 + (128 + 2) * 32 * 1024 * 4


def test_recurrent_layers_run_and_need_what_cudnn_says(library: Run, asks_cudnn: None) -> None:
    found = library("recurrent", gpu="h200")
    # Measured on an H200: reserve 738,197,760 bytes; the workspace 347,078,912. The two final states are of 64 rows.
    states = 2 * 2 * 64 * 1024 * 4
    assert found["kept"] == pytest.approx(738197760 + states, abs=1 << 20)
    assert found["peak"] > 738197760 + 347078912
    assert found["plain"] == pytest.approx(PLAIN_BYTES, abs=1 << 20)
    assert noted(found, "without a card, which is not a documented use")
    assert found["missing"] == []


def test_recurrent_layers_are_estimated_where_cudnn_is_kept_out(library: Run) -> None:
    found = library("recurrent", gpu="h200", PYTEST_VRAM_CUDNN="off")
    states = 2 * 2 * 64 * 1024 * 4
    assert found["kept"] == pytest.approx(738197760 + states, abs=1 << 20)
    assert found["plain"] == pytest.approx(PLAIN_BYTES, rel=0.15)
    assert noted(found, "estimated from their sizes")


def test_unaligned_products_are_padded_and_told(library: Run, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    found = library("compiled", gpu="h200", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert noted(found, "pads matrix products")
    assert found["tflops"] > 0


@pytest.mark.usefixtures("builds")
def test_a_linker_finds_the_driver_as_where_a_card_is_installed(dry_python: Callable[..., Any], tmp_path: Path) -> None:
    """AOTInductor links what it compiles with ``-lcuda``."""
    source, linked = tmp_path / "start.c", tmp_path / "start.so"
    source.write_text("int cuInit(unsigned flags);\nint start(void) { return cuInit(0); }\n")
    variables = environment("h200", base={**os.environ, "LIBRARY_PATH": f"{tmp_path}:"}, replace_real_gpu=True)
    assert variables["LIBRARY_PATH"].split(":")[0] == str(tmp_path)
    assert environment("h200", base=variables, replace_real_gpu=True)["LIBRARY_PATH"] == variables["LIBRARY_PATH"]
    if (compiler := shutil.which("gcc")) is None:
        pytest.skip("AOTInductor needs gcc")
    command = [compiler, "-shared", "-fPIC", str(source), "-lcuda", "-o", str(linked)]
    subprocess.run(command, env=variables, check=True)
    done = dry_python("-c", "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).start())", str(linked), gpu="h200")
    assert done.stdout.strip() == "0", done.stderr


@pytest.mark.usefixtures("builds")
def test_what_inductor_remembers_stays_apart_from_a_real_card_s() -> None:
    own = environment("h200", base={}, replace_real_gpu=True)["TORCHINDUCTOR_CACHE_DIR"]
    assert Path(own) == cache_folder() / "inductor"
    chosen = environment("h200", base={"TORCHINDUCTOR_CACHE_DIR": "/some/cache"}, replace_real_gpu=True)
    assert chosen["TORCHINDUCTOR_CACHE_DIR"] == "/some/cache/pytest-vram-dry"
    again = environment("h200", base=chosen, replace_real_gpu=True)
    assert again["TORCHINDUCTOR_CACHE_DIR"] == chosen["TORCHINDUCTOR_CACHE_DIR"]


def test_the_context_grows_as_it_was_measured(library: Run) -> None:
    found = library("context", gpu="h200")
    assert found["idle"] == 552402944
    assert found["free"] == found["total"] - found["idle"]
    assert found["elementwise"] > found["idle"] + (78 << 20)
    assert found["products"] >= found["elementwise"] + (52 << 20)
    assert found["again"] == found["products"]


def test_a_context_that_was_not_measured_stays_as_it_is(library: Run) -> None:
    found = library("context", gpu="l4")
    assert found["idle"] == found["elementwise"] == found["products"]


def test_managed_memory_lives_on_the_card_while_there_is_room(library: Run) -> None:
    found = library("managed", gpu="l4")
    assert found["held"] == 1 << 30
    assert found["peak"] < 1 << 30
    assert found["full"] == 0


def test_addresses_go_down_as_a_driver_gives_them_out(library: Run) -> None:
    addresses = library("addresses", gpu="h200")["addresses"]
    assert addresses == sorted(addresses, reverse=True)


def test_time_is_made_up_of_kernels(library: Run) -> None:
    same, again, more, none = library("timed", gpu="l4")["times"]
    assert same == again
    assert none < same < more
