"""Kernels, copies and waits are counted as the CUDA runtime's manual describes them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

MB = 1 << 20
TO_DEVICE = {"copies_to_device": 1, "copied_to_device_bytes": MB}
TO_HOST = {"copies_to_host": 1, "copied_to_host_bytes": MB}
WAIT = {"synchronizations": 1}


@pytest.fixture(scope="module")
def work(run_program: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return run_program("work.py", gpu="a100-80")


def value(results: dict[str, Any], name: str) -> Any:
    assert "error" not in results[name], results[name]["error"]
    return results[name]["value"]


def test_products_of_libraries_count_as_one_kernel(work: dict[str, Any]) -> None:
    nothing, add, product, half, with_bias, foreach = value(work, "kernels")
    assert nothing == {}
    assert add == product == half == with_bias == {"launches": 1}
    assert foreach == {"launches": 1, "copies_on_device": 1, "copied_on_device_bytes": 64 * 64 * 4}


def test_copies_count_once_and_wait_as_documented(work: dict[str, Any]) -> None:
    assert value(work, "copies") == [
        TO_DEVICE | WAIT,
        TO_DEVICE | WAIT,
        TO_DEVICE,
        TO_DEVICE,
        TO_HOST | WAIT,
        TO_HOST | WAIT,
        TO_HOST,
        {"copies_on_device": 1, "copied_on_device_bytes": MB},
        {"copies_to_host": 1, "copied_to_host_bytes": 1} | WAIT,
    ]


def test_copies_of_rows_and_copies_without_a_direction(work: dict[str, Any]) -> None:
    rows = {"copies_to_device": 1, "copied_to_device_bytes": 2560}
    assert value(work, "raw_copies") == [
        rows,
        rows | WAIT,
        {"copies_to_device": 1, "copied_to_device_bytes": 100} | WAIT,
        {"copies_to_host": 1, "copied_to_host_bytes": 100} | WAIT,
        {"copies_on_device": 1, "copied_on_device_bytes": 100},
        WAIT,
    ]


def test_what_waits_and_what_only_asks(work: dict[str, Any]) -> None:
    copied = TO_HOST | {"synchronizations": 2}
    assert value(work, "waits") == [WAIT, WAIT, WAIT, {}, {}, {}, copied]


def test_a_graph_counts_whenever_it_is_launched(work: dict[str, Any]) -> None:
    once, thrice = value(work, "graphs")
    assert once == {
        "launches": 2,
        "graph_launches": 1,
        "copies_on_device": 1,
        "copied_on_device_bytes": 4 * MB,
    }
    assert thrice == {name: 3 * count for name, count in once.items()}


SCRIPT = """
import torch
x = torch.zeros(1 << 20, dtype=torch.uint8).cuda()
print(int(x[:4].sum()))
torch.cuda.synchronize()
"""


def test_a_run_says_what_was_launched_copied_and_waited_for(
    run_command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    script, out = tmp_path / "train.py", tmp_path / "out.json"
    script.write_text(SCRIPT)
    done = run_command("--gpu", "l4", "--json", str(out), "--", str(script))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["copied_to_device_bytes"] == MB
    assert found["copies_to_host"] == 1
    assert found["copied_to_host_bytes"] == 8
    assert found["synchronizations"] == 3
    assert found["launches"] > 0
    assert found["devices"][0]["work"]["launches"] == found["launches"]
    lines = {line[:18].strip(): line[19:] for line in done.stderr.splitlines()}
    assert lines["kernels launched"] == f"{found['launches']:,}"
    assert lines["copied to device"] == "1.00 MiB in 1 copy"
    assert lines["copied to host"] == "8 B in 1 copy"
    assert lines["waits for device"] == "3 times"
