"""Whatever a dry GPU assumes is told wherever its figures are: by ``run``, in failures, and in every report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import pytest_vram.drygpu
from pytest_vram.drygpu.process.startup import inherited
from pytest_vram.drygpu.process.variables import CUDNN_VARIABLE
from pytest_vram.drygpu.stub.toolkit import find_toolkit
from pytest_vram.memory import shared_blocks
from pytest_vram.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable

NATIVE = Path(pytest_vram.drygpu.__file__).parent / "native"

# Without cuDNN, whose stand-in answers.
STANDS_IN = """
import os, torch
from torch import nn
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
image = torch.ones(2, 64, 8, 8, device="cuda", dtype=torch.half).to(memory_format=torch.channels_last)
conv = nn.Conv2d(64, 64, 3).cuda().half().to(memory_format=torch.channels_last)
nn.BatchNorm2d(64).cuda()(conv(image)).sum().backward()
torch.linalg.cholesky(torch.eye(4, device="cuda"))
torch.linalg.qr(torch.ones(2, 4, 4, device="cuda"))
torch.fft.rfft(torch.ones(8, device="cuda"))
sparse = torch.eye(4).to_sparse_csr().cuda()
sparse @ sparse
scores = torch.ones(9, 2, 4, device="cuda", requires_grad=True)
labels, lengths = torch.ones(6, dtype=torch.int32), torch.tensor([9, 9], dtype=torch.int32)
nn.functional.ctc_loss(scores, labels, lengths, lengths // 3, reduction="sum").backward()
torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
torch.distributed.all_reduce(torch.ones(4, device="cuda"))
torch.distributed.destroy_process_group()
torch.backends.cudnn.benchmark = True
conv(image[:1])
"""

# With it: recurrent layers, their dropout, and plans of convolutions that a card would time. Spatial transformers take
# no workspace, nor does batch norm of whole planes of channels, so nothing is assumed of them. The large tensor must
# not widen the bounds of a small convolution.
ASKS_CUDNN = """
import torch
from torch import nn
kept = torch.empty(64 << 30, dtype=torch.uint8, device="cuda")
torch.backends.cudnn.benchmark = True
image = torch.ones(8, 64, 56, 56, device="cuda", requires_grad=True)
nn.BatchNorm2d(64).cuda()(nn.Conv2d(64, 64, 3, padding=1).cuda()(image)).sum().backward()
nn.LSTM(64, 64, num_layers=2, dropout=0.5).cuda()(torch.ones(8, 4, 64, device="cuda"))[0].sum().backward()
grid = nn.functional.affine_grid(torch.ones(8, 2, 3, device="cuda", requires_grad=True), [8, 64, 7, 7], False)
nn.functional.grid_sample(image, grid, align_corners=True).sum().backward()
image.record_stream(torch.cuda.Stream())
"""


def names_in_native() -> set[str]:
    """Names of the assumptions that the stub libraries can make, out of their sources."""
    found: set[str] = set()
    for path in NATIVE.glob("*.c"):
        found.update(re.findall(r'dry_note(?:_of)?\(\s*"([^":]+): ', path.read_text()))
    return found


@pytest.mark.skipif(find_toolkit().cudnn_version < 91100, reason="this cuDNN is too old to answer without a device")
def test_run_shows_each_assumption_and_calls_nothing_exact(run_command: Callable[..., Any], tmp_path: Path) -> None:
    shown: set[str] = set()
    for source, options in (
        (STANDS_IN, ("--no-cudnn", "--alloc-conf", "backend:cudaMallocAsync")),
        (ASKS_CUDNN, ()),
    ):
        program, out = tmp_path / "train.py", tmp_path / "out.json"
        program.write_text(source)
        done = run_command("--gpu", "h200", *options, "--json", str(out), "--", str(program))
        assert done.returncode == 0, done.stderr
        found = json.loads(out.read_text())
        assert found["exact"] is False
        summary = done.stderr[done.stderr.index("=== dry run") :]
        assert "exact" not in summary
        for note in found["notes"]:
            assert note["name"] in summary
            assert note["text"] in summary
        shown |= {note["name"] for note in found["notes"]}
    assert not any("batch norm" in note["name"] for note in found["notes"])
    spread = found["devices"][0]["peak_device_spread"]
    assert 0 < spread["high"] - spread["low"] < 128 * MIB, "neither the figure nor the plans that were timed count"
    assert shown == names_in_native() | {"cuSOLVER (linalg_qr)", "cuFFT (_fft_r2c)", shared_blocks.NAME}
    assert len(shown) >= 6


PROJECT = """
import pytest, torch
from torch import nn

conv = nn.Conv2d(64, 64, 3).cuda()

def convolve():
    return conv(torch.ones(2, 64, 32, 32, device="cuda"))

@pytest.mark.vram(max_mb=500)
def test_convolution():
    convolve()

@pytest.mark.vram(max_mb=500)
def test_convolution_again():
    convolve()  # by the plan that PyTorch kept

@pytest.mark.vram(max_mb=500)
def test_linear():
    nn.Linear(64, 64).cuda()(torch.ones(4, 64, device="cuda"))

@pytest.mark.vram(max_mb=500)
def test_decomposition():
    torch.linalg.svd(torch.ones(2, 8, 8, device="cuda"))

@pytest.mark.vram(max_mb=1)
def test_over_its_budget():
    kept = torch.empty(4 << 20, dtype=torch.uint8, device="cuda"), convolve()

@pytest.mark.vram(max_mb=1)
def test_stops_the_history():
    torch.cuda.memory._record_memory_history()
    kept = torch.empty(4 << 20, dtype=torch.uint8, device="cuda")
    torch.cuda.memory._record_memory_history(enabled=None)

@pytest.mark.vram(max_mb=1)
def test_after_it():
    kept = torch.empty(4 << 20, dtype=torch.uint8, device="cuda")  # this line

@pytest.mark.vram(max_gb=100)
def test_recovers():
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 40, dtype=torch.uint8, device="cuda")

def test_fails_for_another_reason(vram):
    convolve()
    assert False
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the terminal said, and the folder with the reports."""
    folder = tmp_path_factory.mktemp("noted")
    (folder / "test_it.py").write_text(PROJECT)
    outputs = [f"--vram-output=report{suffix}" for suffix in (".json", ".md", ".html", ".csv")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--vram-gpu=dry:h200", "--vram-report"]
    variables = {**os.environ, **inherited(os.environ), CUDNN_VARIABLE: "off", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    variables.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [*command, *outputs], cwd=folder, capture_output=True, text=True, check=False, timeout=1800, env=variables
    )
    assert "4 failed, 5 passed" in done.stdout, done.stdout + done.stderr
    return done.stdout, folder


@pytest.fixture(scope="module")
def tests(session: tuple[str, Path]) -> dict[str, Any]:
    data = json.loads((session[1] / "report.json").read_text())
    return {test["nodeid"].partition("::")[2]: test for test in data["tests"]}


def notes_of(test: dict[str, Any]) -> set[str]:
    return {note["name"] for measurement in test["measurements"] for note in measurement.get("notes", ())}


PLANS = "cuDNN execution plans"


@pytest.mark.parametrize(
    ("test", "names"),
    [
        ("test_convolution", {PLANS}),
        ("test_convolution_again", {PLANS}),
        ("test_linear", set()),
        ("test_decomposition", {"cuSOLVER (_linalg_svd)"}),
        ("test_over_its_budget", {PLANS}),
        ("test_stops_the_history", {"memory history"}),
        ("test_after_it", set()),
        ("test_fails_for_another_reason", {PLANS}),
    ],
)
def test_each_test_has_the_assumptions_that_it_made_itself(tests: dict[str, Any], test: str, names: set[str]) -> None:
    assert notes_of(tests[test]) == names


def test_a_plan_without_an_answer_is_as_large_as_its_tensors(tests: dict[str, Any]) -> None:
    image, weight, result = 2 * 64 * 32 * 32, 64 * 64 * 3 * 3, 2 * 64 * 30 * 30
    for name in ("test_convolution", "test_convolution_again"):
        (note,) = (note for measurement in tests[name]["measurements"] for note in measurement["notes"])
        assert note["size_bytes"] == 4 * (image + weight + result)


def test_failures_say_what_they_rest_on(session: tuple[str, Path], tests: dict[str, Any]) -> None:
    out = session[0]
    assert out.count(f"note    {PLANS}: ") == 2, "one over its budget, and one that failed for another reason"
    assert out.count("note    memory history: the program called torch.cuda.memory._record_memory_history") == 1
    line = PROJECT[: PROJECT.index("# this line")].count("\n") + 1
    assert f"test_it.py:{line} in test_after_it" in out, "the next test is recorded again"
    assert not any("holders" in m for m in tests["test_stops_the_history"]["measurements"])


def test_every_report_shows_each_assumption(session: tuple[str, Path]) -> None:
    out, folder = session
    texts = {suffix: (folder / f"report{suffix}").read_text() for suffix in (".json", ".md", ".html", ".csv")}
    for name in (PLANS, "cuSOLVER (_linalg_svd)", "memory history"):
        assert name in out
        for suffix, text in texts.items():
            assert name in text.replace("\\", ""), f"{name} is not in the report{suffix}"


def test_a_test_that_caught_its_error_is_told_from_one_that_did_not_fit(
    session: tuple[str, Path], tests: dict[str, Any]
) -> None:
    out, folder = session
    assert tests["test_recovers"]["outcome"] == "passed"
    assert sum(m.get("ooms", 0) for m in tests["test_recovers"]["measurements"]) > 0
    said = "caught by the test, which went on with less"
    for text in (out, (folder / "report.md").read_text(), (folder / "report.html").read_text()):
        assert said in text
