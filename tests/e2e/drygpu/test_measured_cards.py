"""What a dry card says, beside what was measured on a real one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "peft_benchmark" / "compare.py"


def test_a_published_peak_is_met_within_one_percent() -> None:
    """DoRA was not used to choose the example's one free number, the length of the longest batch."""
    pytest.importorskip("peft")
    command = [sys.executable, str(EXAMPLE), "dora-r32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    found = re.search(r"^dora-r32 +[\d,]+ +[\d,]+ +([+-][\d.]+)%$", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    assert abs(float(found[1])) < 1.0
