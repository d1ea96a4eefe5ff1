"""The command ``python -m pytest_vram run``: run a PyTorch program on a dry GPU, and report the memory that it needed.

The program runs in its own Python process, with environment variables that give it the dry GPU. So its arguments, exit
code, tracebacks, signals and child processes are those of an ordinary run. Each process writes its figures when it
ends, and this module combines them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vram import process_end
from pytest_vram.commands import run_standins
from pytest_vram.commands.run_page import as_report
from pytest_vram.commands.run_processes import killed_early, read
from pytest_vram.commands.run_summary import RunReport, combine
from pytest_vram.commands.run_text import render
from pytest_vram.drygpu.cards import find_card
from pytest_vram.drygpu.process.activate import environment
from pytest_vram.drygpu.process.startup import inherited
from pytest_vram.drygpu.process.variables import (
    CUDNN_VARIABLE,
    RECORD_VARIABLE,
    SIGNAL_SUFFIX,
    SNAPSHOT_VARIABLE,
    TIMELINE_VARIABLE,
)
from pytest_vram.errors import DryGpuError, VramUsageError
from pytest_vram.report import files
from pytest_vram.report.disk import refuse_unwritable, write_atomically
from pytest_vram.standins.hub import forget_older_names
from pytest_vram.units import gb_to_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_vram.drygpu.cards import Card

_FORWARDED = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)  # Windows has the first two
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``run`` to the command line."""
    parser = subparsers.add_parser(
        "run",
        help="run a PyTorch program on a dry GPU and say what memory it needed",
        description="Run an unmodified PyTorch program on a GPU that allocates and does not compute, and say what "
        "memory a real card would have needed.",
        epilog="example: python -m pytest_vram run --gpu rtx-4080 -- train.py --batch-size 4",
    )
    parser.add_argument("--gpu", required=True, metavar="CARD", help="a card of `python -m pytest_vram cards`")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="number of cards (default 1)")
    parser.add_argument("--alloc-conf", metavar="CONF", help="settings of the allocator, as in PYTORCH_CUDA_ALLOC_CONF")
    parser.add_argument("--total-gb", type=_gb, metavar="X", help="device memory in GiB (default: that of the card)")
    parser.add_argument(
        "--no-cudnn",
        action="store_true",
        help="count cuDNN's workspaces as 0 bytes instead of asking the installed cuDNN for their size, which takes up "
        "to a second, and longer with cudnn.benchmark",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    parser.add_argument(
        "--snapshot", type=Path, metavar="OUT", help="write torch's memory history to this file, for memory_viz"
    )
    parser.add_argument(
        "--html", type=Path, metavar="OUT", help="write a page with memory over time and who held the peak"
    )
    run_standins.add_arguments(parser)
    parser.add_argument(
        "command",
        nargs=argparse.REMAINDER,
        metavar="-- SCRIPT.py ARGS | -- -m MODULE ARGS | -- COMMAND ARGS",
        help="the program: a Python script, a module, or a command such as torchrun",
    )
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run the program in ``args``, and print the summary to stderr.

    Returns:
        The program's exit code; 1 if that is 0 and one of the program's ranks failed; 2 if the run could not be made.
    """
    try:
        command = args.command[1:] if args.command[:1] == ["--"] else args.command
        _refuse_unwritable(args)
        report = run(
            command,
            gpu=args.gpu,
            count=args.count,
            alloc_conf=args.alloc_conf,
            total_bytes=None if args.total_gb is None else gb_to_bytes(args.total_gb),
            snapshot=args.snapshot,
            over_time=args.html is not None,
            ask_cudnn=not args.no_cudnn,
            stand_ins=run_standins.from_arguments(args),
        )
        # Printed before files are written: a disk that has filled up meanwhile costs a file, and not the figures.
        print(render(report), file=sys.stderr)
        if args.json is not None:
            write_atomically(args.json, json.dumps(report.as_json(), indent=2) + "\n")
        if args.html is not None:
            files.save(as_report(report, command), args.html)
    except (DryGpuError, VramUsageError, OSError) as error:
        print(f"pytest-vram: {error}", file=sys.stderr)
        return 2
    return report.exit_code or int(report.lost_a_rank)


def _refuse_unwritable(args: argparse.Namespace) -> None:
    """Find out before the program runs whether what is written after it can be."""
    for option in ("json", "snapshot", "html"):
        path: Path | None = getattr(args, option)
        if path is not None:
            refuse_unwritable(path, f"--{option}")
    if args.html is not None and args.html.suffix != ".html":
        raise VramUsageError(f"--html {args.html}: the name of a page ends in .html")


def _gb(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: write a number of GiB above 0, such as 15.7")
    return number


def run(
    command: Sequence[str],
    *,
    gpu: str,
    count: int = 1,
    alloc_conf: str | None = None,
    total_bytes: int | None = None,
    snapshot: Path | None = None,
    over_time: bool = False,
    ask_cudnn: bool = True,
    stand_ins: run_standins.StandIns | None = None,
) -> RunReport:
    """Run ``command`` (a script, ``-m`` and a module, or a program, each with its arguments) on dry GPUs.

    Returns:
        The memory that all processes of the program needed. The program's output goes to this process's stdout and
        stderr.

    Raises:
        DryGpuError: if the dry GPU cannot be put in place.
        VramUsageError: if there is no such card, or ``command`` cannot be run.
    """
    card = find_card(gpu)
    program = _program(command)
    variables = _dry_environment(card, count, total_bytes) | _wishes(
        alloc_conf=alloc_conf, snapshot=snapshot, over_time=over_time, ask_cudnn=ask_cudnn
    )
    with (
        run_standins.in_place(stand_ins or run_standins.StandIns(), command) as prepared,
        tempfile.TemporaryDirectory(prefix="pytest-vram-") as folder,
    ):
        variables.update(prepared.variables)
        variables["PATH"] = _path(program, variables.get("PATH", ""))
        if "HF_HUB_CACHE" in prepared.variables:
            forget_older_names(variables)
        variables[RECORD_VARIABLE] = folder
        began, kills = time.monotonic_ns(), process_end.memory_kills()
        code, ended = _wait_for(program, variables, Path(folder))
        out_of_memory = process_end.killed_since(kills)
        processes, records = read(Path(folder), began, out_of_memory=out_of_memory)
        early = killed_early(Path(folder), processes, out_of_memory=out_of_memory)
        notes = prepared.notes_of(Path(folder))
    return combine(
        processes,
        records,
        card=card,
        count=count,
        total_bytes=total_bytes,
        code=code,
        seconds=(ended - began) / 1e9,
        conf=alloc_conf,
        stand_ins=notes,
        killed_early=early,
    )


def _wishes(*, alloc_conf: str | None, snapshot: Path | None, over_time: bool, ask_cudnn: bool) -> dict[str, str]:
    """Return the variables that tell the program's processes what the command line asks of them."""
    variables = {} if alloc_conf is None else {"PYTORCH_CUDA_ALLOC_CONF": alloc_conf}
    if not ask_cudnn:
        variables[CUDNN_VARIABLE] = "off"
    if snapshot is not None:
        variables[SNAPSHOT_VARIABLE] = str(snapshot.absolute())
    if over_time:
        variables[TIMELINE_VARIABLE] = "1"
    return variables


def _wait_for(program: list[str], variables: dict[str, str], folder: Path) -> tuple[int, int]:
    """Run the program; a signal that ends it is written to the folder.

    Returns:
        Its exit code, and when it ended, in nanoseconds of the monotonic clock.
    """
    try:
        process = subprocess.Popen(program, env=variables)
    except OSError as error:
        raise VramUsageError(f"{program[0]} cannot be started: {error.strerror}") from error
    with _signals_go_to(process):
        code = process.wait()
    ended = time.monotonic_ns()
    if code < 0:
        (folder / f"{process.pid}{SIGNAL_SUFFIX}").write_text(f"{-code} {ended}\n")
    return code, ended


def _dry_environment(card: Card, count: int, total_bytes: int | None) -> dict[str, str]:
    """Return the variables that give a program dry GPUs, whose values its Python processes carry."""
    variables = environment(card, count=count, total_bytes=total_bytes, replace_real_gpu=True)
    variables.update(inherited(variables))
    if variables.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        # The variable hides real GPUs. It would also hide the dry GPUs, which the user asked for.
        del variables["CUDA_VISIBLE_DEVICES"]
    return variables


def _program(command: Sequence[str]) -> list[str]:
    if not command:
        raise VramUsageError("there is nothing to run: write for example `run --gpu rtx-4080 -- train.py --epochs 1`")
    python = [sys.executable, *subprocess._args_from_interpreter_flags()]  # type: ignore[attr-defined]  # private, and so not in the stubs
    first = command[0]
    if first == "-m":
        if len(command) == 1:
            raise VramUsageError("-m needs the name of a module")
        return [*python, *command]
    if first == "-c" or first.endswith(".py") or Path(first).is_dir():
        if first.endswith(".py") and not Path(first).exists():
            raise VramUsageError(f"there is no file {first!r} to run in {os.getcwd()}")
        return [*python, *command]
    found = shutil.which(first) or shutil.which(first, path=_scripts())
    if found is None:
        if Path(first).is_file():
            return [*python, *command]
        raise VramUsageError(f"{first!r} is neither a Python script, nor -m and a module, nor a command")
    return [found, *command[1:]]


def _scripts() -> str:
    """Return the folder of the commands that are installed beside this interpreter."""
    return os.path.dirname(sys.executable)


def _path(program: Sequence[str], path: str) -> str:
    """Return PATH for the program.

    A command of an environment that is not activated is found beside the interpreter. It may start other commands of
    its environment (``axolotl`` starts ``accelerate``), so it gets the PATH of an activated one. A script keeps PATH as
    it is, as under this interpreter alone.
    """
    scripts = _scripts()
    is_command = program[0] != sys.executable and os.path.dirname(program[0]) == scripts
    if not is_command or scripts in path.split(os.pathsep):
        return path
    return os.pathsep.join(part for part in (scripts, path) if part)


@contextlib.contextmanager
def _signals_go_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Forward signals to the program, so that it can end and write its figures, and keep waiting for it."""

    def forward(number: int, _frame: object) -> None:
        # The terminal sends Ctrl-C to the whole foreground group, so the program has received it already.
        if number in (signal.SIGINT, signal.SIGQUIT) and _is_foreground():
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_foreground() -> bool:
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False
