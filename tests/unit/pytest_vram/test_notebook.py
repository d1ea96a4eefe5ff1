"""A notebook's magics, in an IPython shell of its own process: on CPU tensors, and on a dry GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = """
import contextlib, io, json, sys
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance(colors="nocolor")
told = []
for cell in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        result = shell.run_cell(cell, store_history=True)
    error, last = result.error_in_exec, shell.user_ns.get("_vram")
    told.append({
        "text": out.getvalue(),
        "error": type(error).__name__ if error is not None else None,
        "peak": last.peak_bytes if last else None,
        "start": last.start_bytes if last else None,
        "kept": last.kept_bytes if last else None,
        "page": last._repr_html_() if last else "",
    })
print(json.dumps(told))
"""

MADE = """import torch
device = "cuda" if torch.cuda.is_available() else "cpu"
def make(mebibytes):
    return torch.ones(mebibytes, 2**18, device=device)"""
MIB = 2**20
CELLS = {
    "extension": "%load_ext pytest_vram",
    "dry": "%vram_dry rtx-4090",
    "made": MADE,
    "measured": "%%vram\nkept = make(4)\nvalue = (kept * 2).sum().item()\n'shown'",
    "line": "%vram more = make(8)",
    "plain": "beside = make(16)",
    "freed": "%%vram\ndel more",
    "over": "%%vram --max-gb 0.01\nagain = make(16)",
    "broken": "%%vram --save cell.json\ngone = make(2)\n1 / 0",
    "syntax": "%%vram\nif",
    "timed": "%%vram\n%%time\ntimed = make(1)",
    "flag": "%%vram --most 2\nmake(1)",
    "quote": "%%vram --save 'x\nmake(1)",
    "negative": "%%vram --max-gb -2\nmake(1)",
    "nothing": "%vram",
    "late": "%vram_dry l4",
    "twice": "%reload_ext pytest_vram",
    "after": "%vram last = make(1)",
}


def session(folder: Path, cells: dict[str, str]) -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(list(cells.values()))], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(cells, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module", params=["host", "dry"])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("notebook")
    cells = {name: cell for name, cell in CELLS.items() if name != "dry" or request.param == "dry"}
    return request.param, folder, session(folder, cells)


def test_a_cell_shows_its_peak_who_held_it_and_a_picture(ran: Any) -> None:
    kind, _, told = ran
    cell = told["measured"]
    number = 4 if kind == "dry" else 3
    assert cell["error"] is None
    assert (cell["start"], cell["kept"]) == (0, 4 * MIB)
    assert 8 * MIB <= cell["peak"] <= 8 * MIB + 4096  # the sum needs workspace
    assert "'shown'" in cell["text"]
    assert f"Cell In[{number}]:2" not in cell["text"]  # the line that called make, which is in another cell
    assert f"4.00 MiB  Cell In[{number - 1}]:4 in make" in cell["text"]
    assert f"4.00 MiB  Cell In[{number}]:3 in <module>" in cell["text"]
    assert "█" in cell["text"]
    assert f"({kind})" in cell["text"]
    assert ("the cell read 1 values that were not computed" in cell["text"]) == (kind == "dry")
    assert 'srcdoc="&lt;!doctype html' in cell["page"]
    assert cell["page"].count("<iframe") == cell["page"].count("</iframe>") == 1


def test_cells_follow_one_another(ran: Any) -> None:
    kind, _, told = ran
    assert (told["line"]["peak"], told["line"]["start"]) == (12 * MIB, 4 * MIB)
    assert "held before the cell" in told["line"]["text"]
    # CPU tensors are seen from the cell on that creates them while it is measured.
    before = 12 * MIB + (16 * MIB if kind == "dry" else 0)
    assert (told["freed"]["start"], told["freed"]["kept"]) == (before, -8 * MIB)
    assert "the cell freed 8.00 MiB" in told["freed"]["text"]
    assert told["after"]["peak"] > told["after"]["start"]


def test_a_limit_ends_the_cell_with_an_error(ran: Any) -> None:
    _, _, told = ran
    assert told["over"]["error"] == "VramBudgetExceeded"
    assert "more than --max-gb allows (10.2 MiB)" in told["over"]["text"]
    assert "Traceback" not in told["over"]["text"]


def test_a_cell_that_fails_fails_the_notebook_and_is_measured(ran: Any) -> None:
    _, folder, told = ran
    text = told["broken"]["text"]
    assert told["broken"]["error"] == "ZeroDivisionError"
    assert text.count("ZeroDivisionError: division by zero") == 1
    assert re.search(r"line 3\b", text)  # as the notebook counts: the magic's line is the first
    (test,) = json.loads((folder / "cell.json").read_text())["tests"]
    assert test["outcome"] == "failed"
    assert told["broken"]["peak"] - told["broken"]["start"] == 2 * MIB
    assert told["syntax"]["error"] == "SyntaxError"


def test_another_magic_may_be_inside(ran: Any) -> None:
    _, _, told = ran
    assert told["timed"]["error"] is None
    assert "Wall time" in told["timed"]["text"]
    assert told["timed"]["peak"] - told["timed"]["start"] == MIB


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("flag", "unrecognized arguments: --most 2; usage: %%vram [--max-gb X] [--save FILE]"),
        ("quote", "No closing quotation"),
        ("negative", "--max-gb=-2.0: must be above 0"),
        ("nothing", "%vram needs a statement to measure"),
    ],
)
def test_what_is_wrong_is_named(ran: Any, name: str, says: str) -> None:
    _, _, told = ran
    assert told[name]["error"] == "VramUsageError"
    assert says in told[name]["text"]
    assert "Traceback" not in told[name]["text"]


def test_cards_cannot_be_had_after_torch(ran: Any) -> None:
    kind, _, told = ran
    assert told["late"]["error"] == "DryGpuError"
    assert ("restart the kernel" if kind == "host" else "torch has seen them") in told["late"]["text"]


def test_ipython_is_only_needed_in_a_notebook() -> None:
    code = "import sys, pytest_vram, pytest_vram.notebook; print({'IPython', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
