"""Trains every causal language model of transformers, tiny, for one step in bf16 and in NF4, and lists the results.

    python tests/architectures.py                  # all of them, into docs/reference/architectures.md; half an hour
    python tests/architectures.py mamba2 llama     # these, printed; the page is not changed
    python tests/architectures.py --json F KIND..  # the same, into a file

Each architecture runs in a process of its own with a time limit, so that one that hangs or crashes stops no
other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "architectures.md"
FIGURES = PAGE.with_suffix(".json")
SECONDS = 240
"""The time limit of one architecture, both precisions."""
PRECISIONS = ("bf16", "nf4")

Outcomes = dict[str, dict[str, Any]]
"""By precision, the fields of ``every_causal_lm.Outcome``."""


def main() -> int:
    """Run what is asked for, and write or print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model types; all by default")
    parser.add_argument("--json", type=Path, help="write the outcomes to this file, and nothing else")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    support = _prepared()
    found = run(asked.kinds or support.kinds(), jobs=asked.jobs)
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=1))
    elif not asked.kinds:
        write(found)
    return int(any(outcome["state"] in ("crashes", "differs") for each in found.values() for outcome in each.values()))


def run(kinds: list[str], *, jobs: int) -> dict[str, Outcomes]:
    """Try each kind in a child of this process, ``jobs`` of them at a time."""
    found: dict[str, Outcomes] = {}
    waiting, running = list(kinds), dict[int, str]()
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                kind = waiting.pop(0)
                running[_started(kind, Path(folder) / f"{kind}.json")] = kind
            pid, status = os.wait()
            kind = running.pop(pid)
            file = Path(folder) / f"{kind}.json"
            found[kind] = json.loads(file.read_text()) if status == 0 else _died(status)
            for precision, outcome in found[kind].items():
                print(f"{kind:28} {precision:5} {outcome['state']:9} {outcome['detail'][:160]}", flush=True)
    return dict(sorted(found.items()))


def write(found: dict[str, Outcomes]) -> None:
    """Write the figures, and the page that is made of them."""
    import transformers

    FIGURES.write_text(json.dumps({"transformers": transformers.__version__, "outcomes": found}, indent=1) + "\n")
    PAGE.write_text(page(json.loads(FIGURES.read_text())))


def page(figures: dict[str, Any]) -> str:
    """The documentation's page."""
    found: dict[str, Outcomes] = figures["outcomes"]
    counts = {p: sum(each[p]["state"] == "trains" for each in found.values()) for p in PRECISIONS}
    made = sum(each["bf16"]["state"] != "not made" for each in found.values())
    rows = [_row(kind, each) for kind, each in found.items()]
    notes = sorted({note for each in found.values() for note in _notes(each)})
    return "\n".join(
        [
            "# Architectures",
            "",
            f"Every model type that `AutoModelForCausalLM` of transformers {figures['transformers']} knows, with two "
            "layers of random weights, on a CPU. Each takes one training step, checkpointed where the model can be, "
            "and its loss is held against the model's own for the same rows: to 2% in bf16 and to 0.02% in NF4, which "
            "computes in fp32 here.",
            "",
            f"Of {len(found)} model types {made} could be made. In bf16 {counts['bf16']} train, in NF4 "
            f"{counts['nf4']}. `python tests/architectures.py` makes this page.",
            "",
            "Packing is for models that keep rows apart which share a sequence, in both precisions.",
            "",
            "| model type | bf16 | NF4 | packing | notes |",
            "|---|---|---|---|---|",
            *rows,
            "",
            *([] if not notes else ["## Why linear layers get no adapter", "", *(f"* {note}" for note in notes), ""]),
        ]
    )


def _row(kind: str, each: Outcomes) -> str:
    packing = [each[p]["packs"] for p in PRECISIONS if each[p]["state"] == "trains"]
    packs = "" if not packing else "yes" if all(packing) else "no"
    remarks = [] if each["bf16"]["checkpointing"] else ["`--no-checkpointing`"]
    details = list(dict.fromkeys(each[p]["detail"] for p in PRECISIONS if each[p]["state"] != "trains"))
    remarks += [_escaped(detail) for detail in details]
    states = " | ".join(each[p]["state"] for p in PRECISIONS)
    return f"| {kind} | {states} | {packs} | {'; '.join(remarks)} |"


def _notes(each: Outcomes) -> list[str]:
    lines = each["bf16"]["adapted"] or each["nf4"]["adapted"]
    return [line.partition(": ")[2] for line in lines if line.startswith("no adapter on ") and ": " in line]


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _started(kind: str, file: Path) -> int:
    """Begin a child for one kind; returns its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(SECONDS)
    try:
        outcomes = _prepared().outcomes(kind, PRECISIONS)
        file.write_text(json.dumps({name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()}))
    except BaseException as error:
        print(f"{kind}: {error!r}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def _died(status: int) -> Outcomes:
    late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    what = f"no answer in {SECONDS} s" if late else f"the process ended with status {status}"
    facts = {"packs": False, "checkpointing": True, "adapted": []}
    state = "no answer" if late else "crashes"
    return {precision: {"state": state, "detail": what, **facts} for precision in PRECISIONS}


def _prepared() -> Any:
    """The module that takes the steps, with all that is slow to import imported."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    sys.path.insert(0, str(ROOT / "tests" / "properties" / "support"))
    import warnings

    import every_causal_lm
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if every_causal_lm.WARM not in sys.modules:
        every_causal_lm.outcomes("llama", PRECISIONS)
    return every_causal_lm


if __name__ == "__main__":
    begin = time.perf_counter()
    code = main()
    print(f"{time.perf_counter() - begin:.0f} s")
    sys.exit(code)
