"""The tests for a real card, rehearsed on a dry one: budgets and figures hold before a card is rented for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_vram.drygpu.stub.library import ensure_built
from pytest_vram.errors import DryGpuError

ROOT = Path(__file__).parents[2]


def test_what_asks_for_no_value_passes_on_a_dry_card() -> None:
    try:
        ensure_built()
    except DryGpuError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "pytest", "tests/gpu", "--vram-gpu=dry:h200", "-p", "no:cacheprovider", "-v"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, outcome in {
        "test_values_are_computed_and_the_figure_is_the_allocators": "PASSED",
        "test_the_capped_allocator_raises_on_the_line_and_works_again_afterwards": "PASSED",
        "test_a_dry_gpu_does_not_take_the_cards_place": "SKIPPED",
        "test_gradients_that_waited_in_host_memory_are_the_same_bits": "SKIPPED",
        "test_the_optimizers_kernel_comes_to_the_bits_of_its_readable_form[bfloat16-True]": "SKIPPED",
        "test_fused_layers_are_pefts_up_to_rounding": "PASSED",
        "test_nf4_decoded_in_one_launch_is_bitsandbytes_own[True-bfloat16]": "SKIPPED",
    }.items():
        assert f"{name} {outcome}" in done.stdout
