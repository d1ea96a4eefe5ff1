"""What users see is kept in tests/golden; ``python tests/golden/regenerate.py`` writes it anew."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

GOLDEN = Path(__file__).resolve().parents[3] / "golden"


def test_golden_files_are_what_would_be_written_now() -> None:
    done = subprocess.run(
        [sys.executable, str(GOLDEN / "regenerate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_name_with_markup_stays_text_in_markdown() -> None:
    text = (GOLDEN / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in text
    table = [line for line in text.partition("<details>")[0].splitlines() if line.startswith("| ")]
    assert {line.replace("\\|", "").count("|") for line in table} == {8}
