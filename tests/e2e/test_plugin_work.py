"""Budgets of kernels, copies and waits: a test on a machine without a GPU says how often a step may wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

PROJECT = """
import torch

def test_step(gpu, vram):
    x = torch.zeros(1024, device=gpu.device)
    with vram.measure("nothing"):
        pass
    with vram.measure("outer"):
        with vram.measure("step"):
            x.add_(1).mul_(2)
        with vram.measure("reading"):
            x.sum().item()
            x.cpu()
    with vram.measure("sending"):
        torch.zeros(1024).to(gpu.device)
    nothing, step, reading, sending = vram["nothing"], vram["step"], vram["reading"], vram["sending"]
    assert (nothing.launches, nothing.synchronizations, nothing.copied_to_host_bytes) == (0, 0, 0)
    assert (step.launches, step.synchronizations) == (2, 0)
    assert (step.copied_to_host_bytes, step.copied_to_device_bytes) == (0, 0)
    assert (reading.copies_to_host, reading.copied_to_host_bytes, reading.synchronizations) == (2, 4 + 4096, 2)
    assert (sending.copies_to_device, sending.copied_to_device_bytes, sending.synchronizations) == (1, 4096, 1)
    assert vram["outer"].launches == step.launches + reading.launches
    assert vram.peak.launches >= vram["outer"].launches
"""

ON_A_CPU = """
import torch

def test_step(vram):
    with vram.measure("step"):
        torch.zeros(1024).add_(1)
    step = vram["step"]
    assert step.launches is step.synchronizations is step.copied_to_host_bytes is None
    assert step.work is step.copies_to_host is step.copies_to_device is step.copied_to_device_bytes is None
"""


def session(folder: Path, text: str, kind: str, *arguments: str) -> tuple[str, dict[str, Any]]:
    (folder / "test_it.py").write_text(text)
    out = folder / "report.json"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--vram-gpu={kind}", "--vram-report"]
    command += [f"--vram-output={out}", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, env=variables, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(out.read_text())["tests"][0]["measurements"][0]
    return done.stdout, measured


def test_phases_count_kernels_copies_and_waits(tmp_path: Path) -> None:
    text, measured = session(tmp_path, PROJECT, "dry:rtx-4080", "-v")
    by_name = {phase["name"]: phase["work"] for phase in measured["phases"]}
    assert by_name["step"] == {"launches": 2}
    assert by_name["sending"]["copied_to_device_bytes"] == 4096
    assert measured["work"]["synchronizations"] >= 3
    assert "phase step: 2 kernels, 0 waits" in text
    assert "1 wait, 4.00 KiB to the device" in text


def test_a_device_that_does_not_count_says_none(tmp_path: Path) -> None:
    _, measured = session(tmp_path, ON_A_CPU, "host")
    assert "work" not in measured
    assert "work" not in measured["phases"][0]
