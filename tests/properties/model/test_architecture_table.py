"""The table of architectures in the documentation is what the models do: a sample here, all of them nightly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

TESTS = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TESTS))

import architectures  # noqa: E402 - its folder is put on the path above

SAMPLE = ["bart", "deepseek_v3", "gpt_oss", "jetmoe", "llama4_text", "mamba2", "modernbert-decoder", "openai-gpt"]
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
FIGURES = json.loads(architectures.FIGURES.read_text())


def test_the_page_is_made_of_the_figures() -> None:
    assert architectures.PAGE.read_text() == architectures.page(FIGURES)


def test_every_model_type_has_its_row() -> None:
    if FIGURES["transformers"] != transformers.__version__:
        pytest.skip(f"the page is of transformers {FIGURES['transformers']}")
    from every_causal_lm import kinds

    assert sorted(FIGURES["outcomes"]) == kinds()


def test_each_trains_or_is_refused_as_the_page_says(tmp_path: Path) -> None:
    from every_causal_lm import kinds

    file = tmp_path / "outcomes.json"
    asked = kinds() if NIGHTLY else SAMPLE
    command = [sys.executable, str(TESTS / "architectures.py"), "--json", str(file), "--jobs", "2", *asked]
    subprocess.run(command, check=False, timeout=7200)
    found: dict[str, Any] = json.loads(file.read_text())
    same_version = FIGURES["transformers"] == transformers.__version__
    wrong = {}
    for kind, outcomes in found.items():
        for precision, outcome in outcomes.items():
            said = FIGURES["outcomes"].get(kind, {}).get(precision, {}).get("state")
            bad = outcome["state"] in ("crashes", "differs") and outcome["state"] != said
            if bad or (same_version and outcome["state"] != said):
                wrong[f"{kind} {precision}"] = (said, outcome["state"], outcome["detail"])
    assert wrong == {}
