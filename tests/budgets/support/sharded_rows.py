"""Measures the rows of ``sharded_steps.json``, each with the program's own dry run over several cards.

Run from the repository's root; a row of a 70B model takes minutes:

    python tests/budgets/support/sharded_rows.py [NAME ...]          # measure, and write the rows of these names
    python tests/budgets/support/sharded_rows.py --check [NAME ...]  # measure, and exit with 1 if a figure differs
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parents[1] / "sharded_steps.json"
CASES: dict[str, str] = {
    "llama-2-70b, 512 tokens, on 2 x rtx-3090": "--model llama-2-70b --seq 512 --gpu rtx-3090 --count 2",
    "llama-2-70b, 2048 tokens, on 2 x rtx-3090": "--model llama-2-70b --seq 2048 --gpu rtx-3090 --count 2",
    "mixtral-8x7b, 512 tokens, on 2 x rtx-4080": "--model mixtral-8x7b --seq 512 --gpu rtx-4080 --count 2",
    "llama-3.2-1b, 512 tokens, parts on the host, on 2 x rtx-3090": (
        "--model llama-3.2-1b --seq 512 --gpu rtx-3090 --count 2 --offload-base"
    ),
}
"""The flags of each row. The layers are those of PyTorch and peft, so that the figures do not depend on a compiler."""


def measured(flags: str) -> dict[str, Any]:
    """Take the steps of one case in all ranks; the figures of the rank that needs most, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        words = [*flags.split(), "--shard", "--kernels", "torch", "--data", "rows.jsonl", "--dry-run"]
        command = [sys.executable, "-m", "finetune.qlora", *words, "--json", str(file)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if not file.exists():
            raise SystemExit(f"{flags}: exit code {done.returncode}\n{done.stderr}")
        found = json.loads(file.read_text())
    phases = found["phases"]
    named = dict(zip(words[::2], words[1::2], strict=False))
    return {
        "shape": named["--model"],
        "card": named["--gpu"],
        "ranks": found["count"],
        "seq": int(named["--seq"]),
        "micro_batches": 2,
        "offload_base": "--offload-base" in flags,
        "step_peak": max(phases["forward and backward"], phases["update"]),
        "loading_peak": phases["loading"],
        "device_peak": found["peak_device_bytes"],
    }


def main(words: list[str]) -> int:
    """Measure the named rows, or all of them. Return the exit code."""
    check = "--check" in words
    rows = json.loads(ROWS.read_text())
    different = 0
    for name in [word for word in words if word != "--check"] or CASES:
        row = measured(CASES[name])
        print(name, json.dumps(row), flush=True)
        different += check and row != rows.get(name)
        rows[name] = row
        if not check:
            lines = [f" {json.dumps(case)}: {json.dumps(rows[case])}" for case in CASES if case in rows]
            ROWS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return int(different > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
