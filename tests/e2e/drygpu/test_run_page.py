"""``run --html``: the page of a test session, for one command."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROGRAM = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 512)).cuda()
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(2):
    model(torch.ones(256, 512, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_a_run_is_drawn_as_a_test_whose_budget_is_the_card(run_command: Callable[..., Any], tmp_path: Path) -> None:
    program, page, figures = tmp_path / "train.py", tmp_path / "run.html", tmp_path / "run.json"
    program.write_text(PROGRAM)
    done = run_command("--gpu", "rtx-4080", "--html", str(page), "--json", str(figures), "--", str(program))
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert data
    (test,) = json.loads(data[1])["tests"]
    peak = json.loads(figures.read_text())["peak_allocated_bytes"]
    assert test["timeline"]["most"] == peak  # recorded and counted apart, equal to the byte
    assert sum(holder[0] for holder in test["holders"]) == peak
    assert (test["metric"], test["origin"]) == ("device", "card")
    reserved, allocated, *_, segments = test["layout"]["sums"]
    assert allocated == peak < reserved
    assert sum(row[2] for row in test["layout"]["rows"]) == segments
    assert test["budget"] > 15 * 2**30
    assert "train.py" in text
    strings = json.loads(data[1])["strings"]
    assert {"weights", "optimizer", "activations"} <= set(strings)


def test_a_program_that_stops_the_history_is_told_what_is_missing(
    run_command: Callable[..., Any], tmp_path: Path
) -> None:
    program, page, figures = tmp_path / "train.py", tmp_path / "run.html", tmp_path / "run.json"
    program.write_text(
        'import torch\nkept = torch.ones(1 << 20, device="cuda")\n'
        "torch.cuda.memory._record_memory_history(enabled=None)\n"
    )
    done = run_command("--gpu", "rtx-4080", "--html", str(page), "--json", str(figures), "--", str(program))
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert [note["name"] for note in found["notes"]] == ["memory history"]
    assert found["exact"] is True, "the peak does not rest on the history"
    assert "memory history: the program called" in done.stderr
    assert "who held the peak and memory over time are left out" in page.read_text(encoding="utf-8")
