"""Runs the fast tests and dry steps with the lowest, the newest and every torch: ``python tests/matrix.py [ROW ...]``.

Each row gets a virtual environment of its own, made by uv in a cache folder and removed afterwards: a CUDA build of
torch takes 6 GB. ``lowest`` is what ``uv --resolution lowest-direct`` makes of pyproject.toml, so a floor that is
declared is one that was run. Each row is printed as it ends; a row that fails makes the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "tests" / "matrix_programs"
TORCH_MINORS = range(6, 16)
PLUGIN = ("tests/plugin/test_measuring.py", "tests/plugin/test_limits.py", "tests/plugin/test_failing.py")
TIMEOUT_SECONDS = 3600
PLUGIN_NEEDS = (
    "pytest-xdist",
    "pytest-rerunfailures",
    "pytest-asyncio",
    "hypothesis",
    "psutil",
    "pyyaml",
    "jsonschema",
)
SHOWN = ("torch", "transformers", "peft", "bitsandbytes", "pytest")
NOT_RUN = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One environment, and what runs in it.

    Attributes:
        packages: what uv installs; ``.`` is this project.
        resolution: how uv picks among the versions that are allowed.
        tests: paths for pytest; none where the dry steps are enough.
        options: further arguments of pytest.
        steps: run the dry step and the collective of two ranks.
    """

    packages: tuple[str, ...]
    resolution: str = "highest"
    tests: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    steps: bool = True


# pytest 8.4 does not read the configuration of this repository, which is pytest 9's.
_WITHOUT_CONFIGURATION = (
    *("-c", os.devnull, f"--rootdir={ROOT}", "--import-mode=importlib", "-p", "pytester", "--vram-gpu=off"),
)
ROWS = {
    "lowest": Row(packages=(".[test,drygpu]",), resolution="lowest-direct", tests=("tests/unit", *PLUGIN)),
    "newest": Row(packages=(".[test,drygpu]",), tests=("tests/unit", *PLUGIN)),
    "pytest-8.4": Row(
        packages=(".[nvml,report]", "pytest==8.4.0", "torch", *PLUGIN_NEEDS),
        tests=("tests/plugin",),
        options=_WITHOUT_CONFIGURATION,
        steps=False,
    ),
    **{f"torch-2.{minor}": Row(packages=(".", f"torch==2.{minor}.*", "transformers")) for minor in TORCH_MINORS},
}


def main() -> int:
    """Run the rows that are named, or all of them."""
    parser = argparse.ArgumentParser(description="Run the fast tests and dry steps with many versions.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"default: all of {', '.join(ROWS)}")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the environments")
    parser.add_argument(
        "--cache", type=Path, default=_cache(), help="where environments are made (default %(default)s)"
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the environments there, and use those that are there"
    )
    args = parser.parse_args()
    if unknown := [name for name in args.rows if name not in ROWS]:
        parser.error(f"there is no row {unknown[0]!r}; choose from {', '.join(ROWS)}")
    args.cache.mkdir(parents=True, exist_ok=True)
    print("| row | Python | versions | tests | GPT-2 step, dry | experts' tokens | two ranks |")
    print("|---|---|---|---|---|---|---|", flush=True)
    good = True
    for name in args.rows or ROWS:
        cells, passed = _run(name, ROWS[name], python=args.python, cache=args.cache, keep=args.keep)
        good = good and passed
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 0 if good else 1


def _cache() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "pytest-vram" / "matrix"


def _run(name: str, row: Row, *, python: str, cache: Path, keep: bool) -> tuple[list[str], bool]:
    """The cells of a row of the table, and whether all that ran was right."""
    folder = cache / name
    try:
        if failure := _make(folder, row, python):
            return ["", f"cannot be installed: {failure}", *[NOT_RUN] * 4], False
        interpreter = str(folder / "bin" / "python")
        floors = declared() if row.resolution == "lowest-direct" else {}
        found = json.loads(_checked([interpreter, str(PROGRAMS / "versions.py"), *SHOWN, *floors]))
        installed = {package: version for package, version in found["packages"].items() if version}
        versions = ", ".join(f"{package} {installed[package]}" for package in SHOWN if package in installed)
        untrue = [f"{name}>={floor}" for name, floor in floors.items() if not is_floor(floor, installed[name])]
        if untrue:  # another package needs a later version
            versions += f"; declared and not run: {', '.join(untrue)}"
        cells, good = [found["python"], versions], not untrue
        for cell, right in (_tests(interpreter, row), *_steps(interpreter, row)):
            cells.append(cell)
            good = good and right
        return cells, good
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def declared() -> dict[str, str]:
    """The lowest version that pyproject.toml allows of each package; where it names several, the highest of them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["nvml"], *extras["report"], *extras["drygpu"], *extras["finetune"]]
    found: dict[str, str] = {}
    for text in [*asked, *extras["test"]]:
        if match := re.match(r"([\w-]+)>=([0-9.]+)", text):
            found[match[1]] = max(found.get(match[1], "0"), match[2], key=numbers)
    return found


def is_floor(floor: str, version: str) -> bool:
    """Whether ``version`` is the first release that ``floor`` allows, patches aside: 4.66.3 for 4.66."""
    return numbers(version)[: len(numbers(floor))] == numbers(floor)


def numbers(version: str) -> list[int]:
    """A version as numbers, its local part left out: ``2.6.0+cu124`` is 2, 6, 0."""
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]


def _make(folder: Path, row: Row, python: str) -> str:
    """Make the environment unless it is there; what went wrong, or nothing."""
    if (folder / ".made").exists():
        return ""
    uv = [found] if (found := shutil.which("uv")) else [sys.executable, "-m", "uv"]
    packages = [package.replace(".", f"{ROOT}", 1) if package[0] == "." else package for package in row.packages]
    packages = [part for package in packages for part in (("-e", package) if package[0] == "/" else (package,))]
    # pip compiles what it installs, and uv does not: each program would compile torch as it starts.
    install = [*uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", str(folder)]
    install += ["--resolution", row.resolution, *packages]
    for command in ([*uv, "venv", "--quiet", "--clear", "--python", python, str(folder)], install):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return " ".join((done.stderr.strip() or f"exit code {done.returncode}").split())[:300]
    (folder / ".made").touch()
    return ""


def _tests(interpreter: str, row: Row) -> tuple[str, bool]:
    """How pytest's last line counts, and whether nothing failed."""
    if not row.tests:
        return NOT_RUN, True
    command = [interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", *row.options, *row.tests]
    done = _call(command)
    if done.returncode != 0:
        print(done.stdout[-20000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    return re.sub(r" in [0-9.]+s.*", "", last.strip("= ")), done.returncode == 0


def _steps(interpreter: str, row: Row) -> list[tuple[str, bool]]:
    if not row.steps:
        return [(NOT_RUN, True)] * 3
    found, report = _dry(interpreter, [str(PROGRAMS / "step.py")], count=1)
    peak = f"{report['peak_allocated_bytes']:,} B" if report else "failed"
    tokens = str(found["tokens"]) if found else "failed"
    ranks = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    reduced, _ = _dry(interpreter, ["-m", *ranks, str(PROGRAMS / "ranks.py")], count=2)
    text = f"all_reduce {reduced['sum']}" if reduced else "failed"
    return [
        (peak, bool(report)),
        (tokens, bool(found) and min(found["tokens"]) > 0),
        (text, bool(reduced) and reduced["sum"] == [6, 10]),
    ]


def _dry(interpreter: str, program: list[str], *, count: int) -> tuple[dict, dict]:
    """What a program printed as JSON on its last line, and the dry run's report; both empty where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        run = [
            "-m",
            "pytest_vram",
            "run",
            "--gpu",
            "rtx-4080",
            "--count",
            str(count),
            "--json",
            str(out),
            "--",
            *program,
        ]
        done = _call([interpreter, *run])
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode != 0 or not lines:
            print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
            return {}, {}
        return json.loads(lines[-1]), json.loads(out.read_text())


def _checked(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, env=variables, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {TIMEOUT_SECONDS} s")


if __name__ == "__main__":
    sys.exit(main())
