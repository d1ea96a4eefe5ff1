"""Plants bugs in finetune, one at a time, and sees whether the tests notice: ``python tests/mutation.py [MODULE ...]``.

The bugs are in ``mutants/``, five or more a module. Each is put into a copy of the tree, and the module's tests run
there in a forked child of a process that has the heavy libraries imported, up to the first that fails. ``MODULE:3``
plants the third bug alone. A bug that no test notices makes the exit code 1.

A bug may make the tests hang, so they have a limit: of processor time, because other programs may slow them down, and
of wall time for those that wait. The table names the bugs that were noticed by a limit alone.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from mutants import MUTANTS
from mutants.anchor import Bug, plant

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("finetune", "pytest_vram", "tests", "examples", "pyproject.toml", "README.md")
HEAVY = (
    "pytest",
    "hypothesis.stateful",
    "bitsandbytes",
    "datasets",
    "peft",
    "transformers.models.llama.modeling_llama",
    "torch._dynamo",
)
HEAVY += ("transformers.models.mixtral.modeling_mixtral", "torch.utils.checkpoint", "matplotlib.pyplot")
CPU_SECONDS = 300
WALL_SECONDS = 1200
FAILED_TO_RUN = 70
LIMITS = ("timeout", -signal.SIGXCPU, -signal.SIGKILL)
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
sys.dont_write_bytecode = True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="modules such as finetune/model/load; all by default")
    arguments = parser.parse_args()
    chosen: dict[str, list[int]] = {}
    for word in arguments.modules or MUTANTS:
        module, _, number = word.partition(":")
        if module not in MUTANTS:
            parser.error(f"no bugs are listed for {module}; there are {', '.join(MUTANTS)}")
        numbers = range(1, len(MUTANTS[module][1]) + 1)
        if number and not (number.isdecimal() and int(number) in numbers):
            parser.error(f"{module} has bugs 1 to {len(numbers)}, not {number}")
        chosen.setdefault(module, []).extend([int(number)] if number else numbers)
    import_heavy_libraries()
    planted = survivors = 0
    sound: dict[str, int | str] = {}
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy = Path(folder) / "tree"
        copy_tree(copy)
        print(f"{'module':<32} {'caught':<8} seconds  survivors")
        for module, numbers in chosen.items():
            tests, bugs = MUTANTS[module]
            began = time.monotonic()
            if unsound := [test for test in tests if failing_without_a_bug(copy, test, sound)]:
                print(f"{module:<32} fail without a bug: {' '.join(unsound)}", flush=True)
                survivors += 1
                continue
            outcomes = {number: outcome_of(copy, module, bugs[number - 1], tests) for number in numbers}
            alive = [number for number, outcome in outcomes.items() if not is_caught(outcome)]
            late = [number for number, outcome in outcomes.items() if outcome in LIMITS]
            planted, survivors = planted + len(numbers), survivors + len(alive)
            told = "; ".join(f"{number}: {bugs[number - 1]}" for number in alive)
            told += f" (by a limit alone: {', '.join(map(str, late))})" if late else ""
            score = f"{len(numbers) - len(alive)}/{len(numbers)}"
            print(f"{module:<32} {score:<8} {time.monotonic() - began:7.0f}  {told}".rstrip(), flush=True)
        print(f"{planted} bugs in {len(chosen)} modules, {survivors} survived")
    return 1 if survivors else 0


def copy_tree(copy: Path) -> None:
    copy.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, copy / name)


def import_heavy_libraries() -> None:
    """Import the libraries that take longer to import than a test takes to run. finetune is imported after the fork."""
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", HF_HUB_OFFLINE="1")
    os.environ["HYPOTHESIS_PROFILE"] = "mutants"
    import torch

    for name in HEAVY:
        importlib.import_module(name)
    torch.set_num_threads(1)
    gc.freeze()  # pytest collects garbage as it ends: leave out the objects that are shared with the parent


def failing_without_a_bug(copy: Path, test: str, sound: dict[str, int | str]) -> bool:
    """Whether a file of tests fails as it is; each is run once for all modules."""
    if test not in sound:
        sound[test] = run_tests(copy, [test])
        if sound[test]:
            print((copy / "last.log").read_text()[-3000:])
    return sound[test] != 0


def is_caught(outcome: int | str) -> bool:
    """Whether the tests failed, or a signal or a limit ended them."""
    return outcome in (1, 2, "timeout") or (isinstance(outcome, int) and outcome < 0)


def outcome_of(copy: Path, module: str, bug: Bug, tests: list[str]) -> int | str:
    """How the tests end once the bug is planted.

    Raises:
        LostAnchorError: the code to replace is not there exactly once: the list is out of date.
    """
    path = copy / f"{module}.py"
    source = path.read_text()
    path.write_text(plant(source, bug))
    try:
        return run_tests(copy, tests)
    finally:
        path.write_text(source)


def run_tests(copy: Path, tests: list[str]) -> int | str:
    """Exit code of pytest over ``tests`` in the copy; a child that hangs is ended."""
    child = os.fork()
    if child == 0:
        try:
            in_child(copy, tests)
        finally:
            traceback.print_exc()
            os._exit(FAILED_TO_RUN)
    until = time.monotonic() + WALL_SECONDS
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def in_child(copy: Path, tests: list[str]) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    with open(copy / "last.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(copy)
    sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry).resolve() != ROOT)]
    os.environ["PYTHONPATH"] = str(copy)
    import pytest

    code = int(pytest.main([*OPTIONS, *tests]))
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
