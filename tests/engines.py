"""Runs engines for many ranks with a tiny model on 2, 4 and 8 dry GPUs, and lists what each rank needs.

    python tests/engines.py                       # all of them, into docs/reference/engines.md; a quarter of an hour
    python tests/engines.py zero1 trl --counts 2  # these, printed, and merged into the page

``--path FOLDER`` is put on PYTHONPATH for the engines that a launcher starts. Lightning and DeepSpeed are not among
the project's requirements; they can be installed there, without torch:

    pip install --no-deps --target FOLDER lightning lightning-utilities torchmetrics deepspeed hjson py-cpuinfo \\
        msgpack ninja einops pydantic pydantic-core annotated-types typing-inspection
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "tests" / "e2e" / "drygpu" / "programs"
PAGE = ROOT / "docs" / "reference" / "engines.md"
FIGURES = PAGE.with_suffix(".json")
COUNTS = (2, 4, 8)
SECONDS = 900
"""The time limit of one engine at one number of ranks, on an idle machine."""
FORKED = {
    "ddp": "DistributedDataParallel",
    "ddp_views": "DistributedDataParallel, `gradient_as_bucket_view`",
    "zero1": "ZeroRedundancyOptimizer under DistributedDataParallel",
    "fsdp1": "FullyShardedDataParallel, each layer wrapped, `clip_grad_norm_`",
    "fsdp2": "`fully_shard`, bf16, from the meta device",
    "fsdp2_offload": "`fully_shard` with `CPUOffloadPolicy`",
    "hsdp": "`fully_shard` over a mesh of two dimensions",
    "tensor_parallel": "tensor parallel, `clip_grad_norm_` over DTensors",
    "sequence_parallel": "tensor and sequence parallel",
    "context_parallel": "`context_parallel`, attention round a ring",
    "gpipe": "pipeline, `ScheduleGPipe`",
    "pipeline": "pipeline, `Schedule1F1B`",
    "experts": "experts, `all_to_all_single`",
}
LAUNCHED = {
    "accelerate": "accelerate's loop, `accelerate launch`, DDP, `save_state`",
    "trainer": "transformers' Trainer, `torchrun`, with evaluation and a checkpoint",
    "trl": "TRL's SFTTrainer, `torchrun`",
    "lightning_ddp": "Lightning, `ddp`, `torchrun`",
    "lightning_fsdp": "Lightning, `fsdp`, `torchrun`",
    "deepspeed_1": "DeepSpeed, ZeRO-1, `torchrun`",
    "deepspeed_2": "DeepSpeed, ZeRO-2, `torchrun`",
    "deepspeed_3": "DeepSpeed, ZeRO-3, `torchrun`",
    "deepspeed_3_offload": "DeepSpeed, ZeRO-3, weights and optimizer on the host, `torchrun`",
}
SHOWN = ("torch", "transformers", "accelerate", "trl", "lightning", "deepspeed")

Outcome = dict[str, Any]
"""``seconds``, and either ``peaks`` (bytes that torch allocated at most, by rank) or ``error``."""


def main() -> int:
    """Run what is asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help="all by default")
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), metavar="N", help="numbers of ranks")
    parser.add_argument("--path", type=Path, metavar="FOLDER", help="folder with Lightning and DeepSpeed")
    options = parser.parse_args()
    names = options.engines or [*FORKED, *LAUNCHED]
    if unknown := [name for name in names if name not in FORKED | LAUNCHED]:
        parser.error(f"unknown engine {unknown[0]!r}; there are {', '.join(FORKED | LAUNCHED)}")
    found: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"versions": {}, "outcomes": {}}
    found["versions"] |= versions(options.path)
    failed = False
    for count in options.counts:
        # A mesh of two dimensions has at least four ranks.
        own = [name for name in names if name in FORKED and not (name == "hsdp" and count == 2)]
        jobs = [lambda count=count, own=own: forked(own, count)] if own else []
        jobs += [
            lambda name=name, count=count: launched(name, count, options.path) for name in names if name in LAUNCHED
        ]
        for job in jobs:
            for name, outcome in job().items():
                failed |= "error" in outcome
                found["outcomes"].setdefault(name, {})[str(count)] = outcome
                print(f"{name:20} {count} ranks  {json.dumps(outcome)}", flush=True)
            FIGURES.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))
    return int(failed)


def versions(path: Path | None) -> dict[str, str]:
    """What is installed, here and in the folder."""
    folders = [*([] if path is None else [str(path)]), *sys.path]
    return {name: each.version for name in SHOWN for each in metadata.distributions(name=name, path=folders)}


def forked(names: list[str], count: int) -> dict[str, Outcome]:
    """Run engines whose ranks are forked from one process, which has imported torch; by name, what came out."""
    try:
        done = run([str(PROGRAMS / "engines.py"), str(count), *names], count, {}, SECONDS * len(names))
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return {name: {"error": str(error)[-400:]} for name in names}
    return {name: _outcome(answers) for name, answers in json.loads(done.strip().splitlines()[-1]).items()}


def _outcome(answers: list[Outcome | None]) -> Outcome:
    for rank, answer in enumerate(answers):
        if answer is None or "error" in answer:
            return {"error": f"rank {rank}: {'it left no answer' if answer is None else answer['error']}"}
    return {"seconds": answers[0]["seconds"], "peaks": [answer["peak"] for answer in answers]}


def launched(name: str, count: int, path: Path | None) -> dict[str, Outcome]:
    """Run an engine whose ranks a launcher starts; what came out, by its name."""
    arguments = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    if name == "accelerate":
        arguments = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count), "--num_machines=1"]
        arguments += ["--mixed_precision=bf16", "--dynamo_backend=no", "--main_process_port=0"]
    more = {} if path is None else {"PYTHONPATH": str(path.resolve())}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            run(["-m", *arguments, str(PROGRAMS / "launched.py"), name, folder], count, more)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            return {name: {"error": str(error)[-400:]}}
        answers = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(count)]
    return {name: {"seconds": round(time.monotonic() - began, 1), "peaks": [answer["peak"] for answer in answers]}}


def run(arguments: list[str], count: int, more: dict[str, str], seconds: int = SECONDS) -> str:
    """Run a program on dry cards; returns what it printed."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "pytest_vram",
        "run",
        "--gpu",
        "a100-80",
        "--count",
        str(count),
        "--",
    ]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False, timeout=seconds, env=variables, cwd=ROOT
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error: " in line]
        raise RuntimeError(errors[0] if errors else f"exit code {done.returncode}")
    return done.stdout


def page(found: dict[str, Any]) -> str:
    """The documentation's page."""
    shown = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    rows = [_row(name, what, found["outcomes"].get(name, {})) for name, what in (FORKED | LAUNCHED).items()]
    return "\n".join(
        [
            "# Engines for many ranks",
            "",
            "Every way of training on several cards that is tried, with a tiny model and a few steps, on dry A100s. A "
            "cell is what torch allocates at most on each rank, in MiB (smallest to largest where ranks differ), and "
            "the seconds of the job, on two cores that were busy with other work. They say what a dry run costs, and "
            "nothing about a card. Ranks that a launcher starts import everything anew.",
            "",
            f"`python tests/engines.py` makes this page; here with {shown}.",
            "",
            "| engine | " + " | ".join(f"{count} ranks" for count in COUNTS) + " |",
            "|---|" + "---:|" * len(COUNTS),
            *rows,
            "",
            "* DeepSpeed runs with an optimizer of torch. Its own ones are extensions in CUDA and C++, which need a "
            "compiler for CUDA. Most of its figure is a buffer of a fixed size (`reduce_bucket_size`).",
            "* The test suite runs eight of these at 2 ranks and seven at 4 (ZeRO-1, both FSDPs, the mesh of two "
            "dimensions, tensor parallel, `Schedule1F1B`, experts), `fully_shard` at 8, and "
            "accelerate and the Trainer at 2.",
            "* TRL's rows differ in length from rank to rank, and so do the figures.",
            "",
        ]
    )


def _row(name: str, what: str, outcomes: dict[str, Outcome]) -> str:
    return f"| {what} | " + " | ".join(_cell(outcomes.get(str(count))) for count in COUNTS) + " |"


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return "not tried"
    if "error" in outcome:
        return "fails: " + " ".join(outcome["error"].split()).replace("|", "\\|")
    sizes = sorted({f"{peak / 2**20:,.1f}": peak for peak in outcome["peaks"]}.items(), key=lambda item: item[1])
    span = sizes[0][0] if len(sizes) == 1 else f"{sizes[0][0]} to {sizes[-1][0]}"
    return f"{span}; {outcome['seconds']} s"


if __name__ == "__main__":
    sys.exit(main())
