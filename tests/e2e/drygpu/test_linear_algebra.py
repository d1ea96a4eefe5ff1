"""Functions whose libraries a dry GPU has not got, and sensors that it has not got either: each is answered."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def test_every_function_of_linalg_and_fft_runs(run_program: Callable[..., dict[str, Any]]) -> None:
    """With results to write to and backward too, and with shapes and strides as on the CPU where torch tells none."""
    found = run_program("linear_algebra.py", gpu="h200")
    assert found["failed"] == {}
    assert found["not called"] == []
    assert found["called"] > 60


ONE_MATRIX = """
import json, torch
from pytest_vram.drygpu import driver, notes
from pytest_vram.drygpu.values import host_reads
MiB = 1 << 20
old = torch.full((4096,), 7, dtype=torch.int32, device="cuda")
del old  # the error codes of the solvers lie where these numbers were
found = {}
with torch.no_grad():
    a = torch.empty(2048, 2048, device="cuda")
    for name, call in {
        "eigh": lambda: torch.linalg.eigh(a),
        "solve": lambda: torch.linalg.solve(a, a),
        "cholesky": lambda: torch.linalg.cholesky(a),
        "svd": lambda: torch.linalg.svd(a[:1024, :512]),
    }.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        found[name] = (torch.cuda.max_memory_allocated() - before) / MiB
work, earlier = {}, host_reads.collect()
for name, call in {
    "tril": lambda: a.tril(),
    "cholesky_ex": lambda: torch.linalg.cholesky_ex(a),
    "cholesky": lambda: torch.linalg.cholesky(a),
}.items():
    before = driver.work()
    call()
    added = driver.work() - before
    work[name] = (added.launches, added.synchronizations, added.copied_to_host_bytes)
found["work"] = work
found["reads"] = [read.location for read in host_reads.since(earlier)]
found["notes"] = [note.name for note in notes.so_far()]
print(json.dumps(found))
"""


def test_torchs_own_code_runs_for_one_matrix(dry_python: Callable[..., Any]) -> None:
    """On an H200 the eigenvectors, eigenvalues, error code and workspace of 2048 x 2048 were 82 MiB and 8.5 KiB."""
    done = dry_python("-c", ONE_MATRIX, gpu="h200")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["eigh"] == 82 + 8.5 / 1024
    assert found["solve"] >= 32  # the factors and the solution
    assert found["cholesky"] >= 16
    assert found["svd"] >= 2 + 3  # U with as many columns as V, and a workspace of more than 3 MB
    assert found["notes"] == ["cuSOLVER"]
    solved, checked = found["work"]["cholesky_ex"], found["work"]["cholesky"]
    assert (solved[0], found["work"]["tril"][0]) == (3, 1), "the copy, the solver and the triangle"
    assert [after - before for before, after in zip(solved, checked, strict=True)][1:] == [1, 1], "the errors are read"
    assert found["reads"] == []


SENSORS = """
import json, torch, pynvml
torch.ones(1, device="cuda")
cuda = torch.cuda
names = ("temperature", "power_draw", "clock_rate", "utilization", "memory_usage", "device_memory_used")
found = {name: getattr(cuda, name)() for name in names if hasattr(cuda, name)}
found["processes"] = cuda.list_gpu_processes()
pynvml.nvmlInit()
card = pynvml.nvmlDeviceGetHandleByIndex(0)
for name in ("TotalEnergyConsumption", "EnforcedPowerLimit", "PowerManagementLimit", "FanSpeed", "PerformanceState",
             "CurrPcieLinkWidth", "CurrPcieLinkGeneration"):
    found[name] = getattr(pynvml, f"nvmlDeviceGet{name}")(card)
for name in ("ClockInfo", "MaxClockInfo"):
    found[name] = [getattr(pynvml, f"nvmlDeviceGet{name}")(card, kind) for kind in range(4)]
found["limits"] = pynvml.nvmlDeviceGetPowerManagementLimitConstraints(card)
try:
    pynvml.nvmlDeviceGetTemperature(card, 7)
except pynvml.NVMLError_InvalidArgument:
    found["no such sensor"] = True
print(json.dumps(found))
"""


def test_sensors_say_what_a_card_at_rest_says(dry_python: Callable[..., Any]) -> None:
    done = dry_python("-c", SENSORS, gpu="l4")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["temperature"], found["power_draw"], found["clock_rate"]) == (30, 50_000, 1500)
    assert (found["utilization"], found["memory_usage"]) == (0, 0)
    assert found["device_memory_used"] > 1 << 20
    assert "MB GPU memory" in found["processes"]
    assert found["ClockInfo"] == [1500, 1500, 5000, 1500]
    assert found["EnforcedPowerLimit"] in range(found["limits"][0], found["limits"][1] + 1)
    assert found["no such sensor"]
