"""Speed and memory of the same QLoRA step through seven recipes on one card, or its memory and counts on a dry one.

    python benchmarks/gpu_speed.py                                   # on the card that is there
    python benchmarks/gpu_speed.py --dry h200                        # without one: peak memory, kernels, copies, waits
    python benchmarks/gpu_speed.py --settings mistral-7b:512:1:8 --recipes trl-liger ours --json out.json --profile prof

``trainer`` is the recipe of artidoro/qlora, ``trl`` TRL's SFTTrainer, ``trl-liger`` the same with liger-kernel,
``unsloth`` Unsloth's own loader and checkpoints under SFTTrainer, ``ours`` finetune with every layer recomputed, as the
others do, and their inputs on the host, which is the leanest; ``ours-auto`` finetune as it comes with ``--micro-batch
ROWS --accumulation ACCUMULATION``: with as many layers that keep their activations as the card has room for; and
``ours-batch`` finetune as it comes with ``--batch``: it chooses the micro-batches of the same rows too. What is not
installed is left out and named. A recipe that fails says so in its line, and ``--json`` has the end of its errors; the
others go on. Unsloth 2026.10.9 wants transformers 5.17, TRL 1.15 and datasets 4 or older, with which all recipes run.
A setting is SHAPE:TOKENS:ROWS:ACCUMULATION.

The first two columns are the peak of PyTorch's allocator, allocated and reserved. Weights are random, and made on the
card. Losses and gradient norms are shown, because a step that trains nothing is fast. Tokens a second are the median of
the timed steps. The last step is profiled, for the share of matrix products. The utilisation is of the card's own
matrix products, measured in the same process.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from pytest_vram.shapes import SHAPES, find_shape

HERE = Path(__file__).parent
NEEDS = {"trainer": (), "trl": ("trl",), "trl-liger": ("trl", "liger_kernel"), "unsloth": ("unsloth",)}
NEEDS |= {"ours": (), "ours-auto": (), "ours-batch": ()}
SETTINGS = ("llama-3.1-8b:2048:4:1", "mistral-7b:512:1:8")
STEPS = 7  # two to warm up, four that are timed, one that is profiled
GIB = 2**30
SECONDS, DRY_SECONDS = 600.0, 3600.0
"""The most that a run may take. The host of a dry card does everything that the card would."""
RAISED = re.compile(r"(\w+\.)*\w*(Error|Exception|Interrupt)\b")
"""The line with which Python ends a traceback."""
TOLD = 40
"""Lines of a failed run's errors that go to the file."""


def missing(recipe: str) -> list[str]:
    return [name for name in NEEDS[recipe] if importlib.util.find_spec(name) is None]


def run(command: list[str], seconds: float) -> tuple[int, list[str]]:
    """Run a command. Whatever ends this process, or the time, ends all processes that the command has started too.

    Returns:
        Its exit code, and the lines of its errors.
    """
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            _, errors = process.communicate(timeout=seconds)
        finally:  # the card has to be free for the next run, and after the last one
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, errors.splitlines()


def reason(code: int, lines: list[str]) -> str:
    """Why a run failed, in one line."""
    raised = [line.strip() for line in lines if RAISED.match(line)]
    if any("OutOfMemoryError" in line for line in raised):
        return "out of memory: this recipe needs more than the card has"
    if raised:
        return raised[-1]
    if code < 0:
        return f"ended by {signal.Signals(-code).name}: if that is SIGKILL, the host may have had too little memory"
    return lines[-1] if lines else f"ended with exit code {code}, and said nothing"


def one(recipe: str, setting: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own measured; ``error`` where it failed."""
    shape, seq, rows, accumulation = setting.split(":")
    steps = 3 if arguments.dry else arguments.steps
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [str(HERE / "speed_step.py"), recipe, shape, "--seq", seq, "--micro-batch", rows]
        command += ["--accumulation", accumulation, "--steps", str(steps), "--out", str(out)]
        if arguments.profile is not None:
            arguments.profile.mkdir(parents=True, exist_ok=True)
            command += ["--profile", str(arguments.profile / f"{recipe}-{setting.replace(':', '-')}.txt")]
        if arguments.dry:
            command = ["-m", "pytest_vram", "run", "--gpu", arguments.dry, "--", *command]
        seconds = arguments.timeout or (DRY_SECONDS if arguments.dry else SECONDS)
        try:
            code, lines = run([sys.executable, *command], seconds)
        except subprocess.TimeoutExpired:
            return {"recipe": recipe, "error": f"not done after {seconds:,.0f} s (--timeout)"}
        if not out.exists():
            return {"recipe": recipe, "error": reason(code, lines), "stderr": lines[-TOLD:]}
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def line(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"  {found['recipe']:<10} {found['error']}"
    memory = f"{found['peak_allocated_bytes'] / GIB:>8.2f} {found['peak_reserved_bytes'] / GIB:>8.2f}"
    if found["dry"]:
        work = found["work"]
        copied = (work["copied_to_device_bytes"] + work["copied_to_host_bytes"]) / 2**20
        return (
            f"  {found['recipe']:<10} {memory} {work['launches']:>9,} {copied:>11,.1f} {work['synchronizations']:>7,}"
        )
    numbers = f"{found['losses'][-1]:>9.4f} {found['gradient_norms'][-1]:>9.4f}"
    products = found["matrix_products_share"]
    shares = f"{'-' if products is None else f'{products:.0%}':>9} {found['flops_utilisation']:>7.1%}"
    return f"  {found['recipe']:<10} {memory} {found['tokens_per_second']:>10,.0f} {shares} {numbers}"


def head(*, dry: bool) -> str:
    memory = f"  {'recipe':<10} {'alloc GiB':>8} {'res. GiB':>8}"
    if dry:
        return f"{memory} {'kernels':>9} {'copied MiB':>11} {'waits':>7}   (one step)"
    return f"{memory} {'tokens/s':>10} {'products':>9} {'FLOPs':>7} {'loss':>9} {'norm':>9}"


def save(results: list[dict[str, Any]], path: Path | None) -> None:
    """Write what there is so far: a run on a rented card may be stopped. The file is whole at any time."""
    if path is not None:
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        part.replace(path)


def stopped(number: int, _: object) -> NoReturn:
    """End as Ctrl-C does when a job or the connection ends, so that the run that is under way ends too."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def measure(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Run every recipe with every setting. Print, add to ``results`` and save what each measured when it is done."""
    for setting in arguments.settings:
        print(f"{setting}\n{head(dry=bool(arguments.dry))}", flush=True)
        for recipe in arguments.recipes:
            lacking = missing(recipe)
            if lacking:
                print(f"  {recipe:<10} left out: {', '.join(lacking)} is not installed", flush=True)
                continue
            if recipe == "ours-batch" and setting.endswith(":1") and "ours-auto" in arguments.recipes:
                print(f"  {recipe:<10} left out: without accumulation there is nothing to split", flush=True)
                continue
            waiting = f"  {recipe:<10} is running ..." if sys.stdout.isatty() else ""
            print(waiting, end="\r" if waiting else "", flush=True)
            found = one(recipe, setting, arguments)
            results.append({"setting": setting, **found})
            print(line(found).ljust(len(waiting)), flush=True)
            save(results, arguments.json)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=list(NEEDS), default=list(NEEDS))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), metavar="SHAPE:TOKENS:ROWS:ACCUMULATION")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"steps of each run on a card, 7 or more (default {STEPS})"
    )
    parser.add_argument("--dry", metavar="CARD", help="a dry card: memory and counts, no time")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="write each run's profile there")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures to this file")
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help=f"the most that one run may take (default {SECONDS:.0f}, with --dry {DRY_SECONDS:.0f})",
    )
    arguments = parser.parse_args()
    if arguments.steps < STEPS:
        parser.error(f"--steps {arguments.steps}: {STEPS} or more, so that four are timed")
    for setting in arguments.settings:
        shape, *numbers = setting.split(":")
        if len(numbers) != 3 or not all(part.isdecimal() and int(part) for part in numbers):
            parser.error(
                f"--settings {setting}: write SHAPE:TOKENS:ROWS:ACCUMULATION, such as {SETTINGS[0]}; none of them is 0"
            )
        if find_shape(shape) is None:
            parser.error(f"--settings {setting}: no shape is called {shape}; there are {', '.join(SHAPES)}")
    results: list[dict[str, Any]] = []
    try:
        save(results, arguments.json)  # now, and not after eight minutes
    except OSError as error:
        parser.error(f"--json {arguments.json}: {error.strerror}: name a file in a folder that exists")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, stopped)
    try:
        measure(arguments, results)
    except KeyboardInterrupt:
        kept = f"{len(results)} results are in {arguments.json}" if arguments.json else "no file was asked for"
        print(f"\nstopped; {kept}", file=sys.stderr)
        return 130
    return int(any("error" in found for found in results))


if __name__ == "__main__":
    raise SystemExit(main())
