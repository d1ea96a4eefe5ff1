"""Plants bugs in finetune, one at a time, and sees whether the tests notice: ``python tests/mutation.py [MODULE ...]``.

The bugs are in ``mutants.py``, five or more a module. Each is put into a copy of the tree, and the module's tests run
there in a forked child of a process that has the heavy libraries imported. A bug that no test notices makes the exit
code 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("finetune", "pytest_vram", "tests", "examples", "pyproject.toml", "README.md")
SECONDS = 300
FAILED_TO_RUN = 70
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:vram", "-W", "ignore::pytest.PytestAssertRewriteWarning")
sys.dont_write_bytecode = True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="modules of finetune; all by default")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from mutants import MUTANTS

    chosen = arguments.modules or list(MUTANTS)
    unknown = set(chosen) - set(MUTANTS)
    if unknown:
        parser.error(f"no bugs are listed for {', '.join(sorted(unknown))}; there are {', '.join(MUTANTS)}")
    import_heavy_libraries()
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy = Path(folder) / "tree"
        copy_tree(copy)
        print(f"{'module':<14} {'caught':<8} seconds  survivors")
        for module in chosen:
            tests, bugs = MUTANTS[module]
            began = time.monotonic()
            if outcome := run_tests(copy, tests):
                print(f"{module:<14} the tests fail without a bug ({outcome}): {' '.join(tests)}")
                print((copy / "last.log").read_text()[-3000:])
                survivors += 1
                continue
            alive = [number for number, (old, new) in enumerate(bugs) if not caught(copy, module, old, new, tests)]
            survivors += len(alive)
            told = "; ".join(f"{bugs[n][0]!r} -> {bugs[n][1]!r}" for n in alive)
            print(
                f"{module:<14} {len(bugs) - len(alive)}/{len(bugs):<6} {time.monotonic() - began:7.0f}  {told}",
                flush=True,
            )
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
    """What takes longer to import than a test takes to run. finetune itself is imported after the fork."""
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", HF_HUB_OFFLINE="1")
    import bitsandbytes
    import datasets
    import peft
    import torch
    import transformers
    from transformers import LlamaForCausalLM, MixtralForCausalLM

    torch.set_num_threads(1)
    assert all((bitsandbytes, datasets, peft, transformers, LlamaForCausalLM, MixtralForCausalLM))


def caught(copy: Path, module: str, old: str, new: str, tests: list[str]) -> bool:
    """Whether the tests fail once ``old`` is ``new``.

    Raises:
        SystemExit: the text to replace is not there exactly once: the list is out of date.
    """
    path = copy / "finetune" / f"{module}.py"
    source = path.read_text()
    if source.count(old) != 1:
        raise SystemExit(f"{module}.py holds {old!r} {source.count(old)} times, not once: bring mutants.py up to date")
    path.write_text(source.replace(old, new))
    try:
        return run_tests(copy, tests) in (1, 2, "timeout")
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
    until = time.monotonic() + SECONDS
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
