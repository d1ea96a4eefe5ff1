"""What only a real card can show: the probe against torch and NVML, and the dry GPU against the card itself."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

STEP = """
import json, sys
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(2048, 2048), nn.GELU()))).cuda()
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(3):
    model(torch.randn(512, 2048, device="cuda")).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
figures = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
json.dump(figures, open(sys.argv[1], "w"))
"""


def nearest_card() -> str:
    """The card of the table that is of this one's make, by compute capability and memory."""
    import torch

    from pytest_vram.drygpu import CARDS

    here = torch.cuda.get_device_properties(0)
    alike = [c for c in CARDS if c.capability == (here.major, here.minor)]
    if not alike:
        pytest.skip(f"no card of the table has compute capability {here.major}.{here.minor}")
    return min(alike, key=lambda card: abs(card.total_bytes - here.total_memory)).name


def test_a_dry_step_has_the_peak_of_the_real_one(tmp_path: Path) -> None:
    script = tmp_path / "step.py"
    script.write_text(STEP)
    subprocess.run([sys.executable, str(script), str(tmp_path / "real.json")], check=True)
    from pytest_vram.drygpu import environment
    from pytest_vram.drygpu.startup import inherited

    env = environment(nearest_card(), replace_real_gpu=True)
    dry = {**env, **inherited(env)}
    subprocess.run([sys.executable, str(script), str(tmp_path / "dry.json")], check=True, env=dry)
    measured, predicted = (json.loads((tmp_path / f"{kind}.json").read_text()) for kind in ("real", "dry"))
    assert predicted["allocated"] == pytest.approx(measured["allocated"], rel=0.01)
    assert predicted["reserved"] == pytest.approx(measured["reserved"], rel=0.02)


@pytest.mark.vram(max_mb=256)
def test_the_probe_reads_what_torch_says(gpu, vram) -> None:
    import torch

    assert gpu.kind == "cuda"
    assert gpu.computes
    with vram.measure("tensor"):
        tensor = torch.ones(32 * 2**20, device=gpu.device)
    assert float(tensor.sum()) == 32 * 2**20
    assert vram["tensor"].added == 128 * 2**20
    assert vram.peak.allocated == torch.cuda.max_memory_allocated()


def test_nvml_knows_this_process(gpu) -> None:
    pynvml = pytest.importorskip("pynvml")
    import torch

    from pytest_vram.probe.nvml import process_bytes

    held = torch.ones(64 * 2**20, device=gpu.device)
    properties = torch.cuda.get_device_properties(0)
    used = process_bytes(f"GPU-{properties.uuid}", 0)
    assert pynvml.nvmlDeviceGetCount() >= 1
    if used is None:
        pytest.skip("the driver does not tell processes apart here, as in many containers")
    assert used >= held.numel() * 4
