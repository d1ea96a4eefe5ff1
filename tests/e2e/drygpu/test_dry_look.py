"""``--dry-run`` as a user runs it: exit codes, figures, the page, and a GPU that is there."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from finetune.errors import ExitCode
from finetune.qlora import main

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    from conftest import DryPython

LOOK = ["--dry-run", "--seq", "128", "--micro-batch", "1", "--checkpointing", "all", "--model"]
OPEN = ["--dry-run", "--seq", "128", "--model"]


def page(path: Path) -> dict[str, Any]:
    """The only test of a page, with its strings."""
    data = re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert data
    found = json.loads(data[1])
    (test,) = found["tests"]
    return test | {"strings": found["strings"]}


def test_a_run_that_fits_with_its_page_and_figures(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    html, figures = tmp_path / "run.html", tmp_path / "run.json"
    files = ["--html", str(html), "--json", str(figures)]
    assert main([*LOOK, str(tiny_llama), "--gpu", "rtx-4060", *files]) == ExitCode.OK
    assert "fits rtx-4060" in capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert found["fits"]
    assert sum(found["categories"].values()) == pytest.approx(found["peak_allocated_bytes"], rel=0.001)
    shown = page(html)
    assert shown["timeline"]["most"] == found["peak_allocated_bytes"]  # recorded and counted apart
    assert sum(holder[0] for holder in shown["holders"]) > 0.99 * found["peak_allocated_bytes"]
    assert (shown["peak"], shown["budget"]) == (found["peak_device_bytes"], found["total_bytes"])
    assert shown.get("verdict", "within") == "within"
    assert shown["layout"]["sums"][1] == found["peak_allocated_bytes"]  # segments at the peak
    assert len(shown["phases"]) == 7  # loading, adapter, two steps of two phases, evaluation
    text = html.read_text(encoding="utf-8")
    assert f"python -m finetune.qlora --model {tiny_llama}" in text
    assert any("finetune/model/load.py" in name for name in shown["strings"])
    assert {"weights", "adapters", "gradients"} <= set(shown["strings"])


def test_a_run_that_does_not_fit_shows_what_it_would_need(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    html, figures = tmp_path / "run.html", tmp_path / "run.json"
    large = ["--micro-batch", "20000", "--no-checkpointing", "--loss-chunk", "1000000"]
    files = ["--html", str(html), "--json", str(figures)]
    code = main([*LOOK, str(tiny_llama), *large, "--gpu", "rtx-4060", *files])
    assert code == ExitCode.OUT_OF_MEMORY
    told = capsys.readouterr().out
    assert "does NOT fit rtx-4060" in told
    assert "missing" in told
    found = json.loads(figures.read_text())
    assert not found["fits"]
    assert found["peak_device_bytes"] > found["total_bytes"]
    assert "CUDA out of memory" in found["out_of_memory"]
    shown = page(html)
    assert shown["verdict"] == "exceeded"
    assert shown["timeline"]["most"] == found["peak_allocated_bytes"]


def test_beneath_another_dry_run_the_card_that_is_there_is_measured(
    tiny_llama: Path, run_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_command("--gpu", "rtx-4070", "--", "-m", "finetune.qlora", *OPEN, str(tiny_llama))
    assert done.returncode == ExitCode.OK, done.stderr
    assert "micro-batch 16, accumulation 1, paged-adamw: fits NVIDIA GeForce RTX 4070" in done.stdout
    assert "the 16 rows of a step are computed in micro-batches of 16, and no layer recomputes anything" in done.stdout
    assert "dry GPU" in done.stdout


POSING = """
import sys, types
from pathlib import Path
import torch  # and what carries values, as a real card does
import pytest_vram.drygpu
pytest_vram.drygpu.driver = types.SimpleNamespace(is_active=lambda: False)
from finetune.dryrun.trial_process import main
main(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_real_card_is_asked_through_torch_alone_and_says_the_same(
    tiny_llama: Path, dry_python: DryPython, tmp_path: Path
) -> None:
    from finetune.config import yaml_file
    from finetune.config.settings import RunConfig
    from finetune.dryrun.command import trial_settings, trials
    from finetune.dryrun.messages import Request, Result
    from pytest_vram.memory.codec import decode, encode

    config = yaml_file.replace(RunConfig(), {"model": str(tiny_llama), "seq": 128})
    request = Request(kind="run", over_time=True, settings=trial_settings(config))
    files = [tmp_path / "request.json", tmp_path / "result.json"]
    files[0].write_text(json.dumps(encode(request)))
    done = dry_python("-c", POSING, *map(str, files), gpu="rtx-4060")
    assert done.returncode == 0, done.stderr
    (real,) = decode(Result, json.loads(files[1].read_text())).trials
    (dry,) = trials(config, [{}], "rtx-4060")
    assert not real.dry
    assert dry.dry
    for name in ("fits", "phases", "categories", "peak_allocated", "peak_reserved", "total", "device"):
        assert getattr(real, name) == getattr(dry, name), name
    # The driver's count of a real card has no managed memory apart, which lies on it while there is room.
    assert real.context == dry.context + dry.managed
    assert real.recording is not None


def test_a_row_that_the_model_has_no_token_for_is_told_before_training(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<|call|>"])
    tokenizer.save_pretrained(model)
    rows = tmp_path / "rows.jsonl"
    texts = ["yo", "<|call|>"]
    rows.write_text("".join(json.dumps({"prompt": "hi", "completion": text}) + "\n" for text in texts))
    look = [*LOOK, str(model), "--data", str(rows), "--gpu", "rtx-4060"]
    assert main(look) == ExitCode.USAGE
    assert f"{rows}:2: holds the token '<|call|>' (id 260)" in capsys.readouterr().err
    assert main([*look, "--resize-embeddings"]) == ExitCode.OK
    assert "fits rtx-4060" in capsys.readouterr().out
