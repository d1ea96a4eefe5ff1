"""The cases of this folder run dry, beside what they needed on a real card.

    python tests/truth/table.py [CASE ...] [--measured h200] [--json OUT.json] [--phases]

``h200.jsonl`` has what torch's counters said on a real H200, phase by phase; ``h200.json`` has the card and the
versions that were installed there. Other versions allocate otherwise: those that differ here are named above the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

from pytest_vram.memory import Note, note_lines, spread_of  # noqa: E402 - its folder is put on the path above
from pytest_vram.memory.codec import decode  # noqa: E402 - likewise


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What one real card measured.

    Attributes:
        card: its name in the card table.
        versions: the packages that were installed, by distribution.
        cases: marks and context by case, as program.py writes them.
    """

    card: str
    versions: dict[str, str]
    cases: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """One case, measured and dry. Peaks are the highest of all phases, in bytes."""

    case: str
    allocated: tuple[int, int]
    reserved: tuple[int, int]
    allocations: tuple[int, int]
    exact_marks: tuple[int, int]
    notes: tuple[Note, ...]
    outside: tuple[str, ...]
    """Measured peaks that do not lie between the bounds of the dry ones, each as ``PHASE KEY``."""

    @property
    def allocated_off(self) -> float:
        """By how much the dry peak of allocated bytes is off, in percent."""
        return percent(*self.allocated)

    @property
    def reserved_off(self) -> float:
        """By how much the dry peak of reserved bytes is off, in percent."""
        return percent(*self.reserved)


def percent(measured: int, dry: int) -> float:
    """Return by how much ``dry`` is above ``measured``, in percent."""
    return 100 * (dry - measured) / measured if measured else 0.0


def load(name: str) -> Truth:
    """Read what the card ``name`` measured."""
    about = json.loads((HERE / f"{name}.json").read_text())
    lines = [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]
    return Truth(card=about["card"], versions=about["versions"], cases={line["case"]: line for line in lines})


def differing(truth: Truth, packages: tuple[str, ...]) -> list[str]:
    """Return what is to be said of each of ``packages`` that is missing here, or is not the measured version."""
    found: list[str] = []
    for package in packages:
        try:
            here = metadata.version(package)
        except metadata.PackageNotFoundError:
            found.append(f"{package} is not installed")
            continue
        there = truth.versions.get(package, here)
        if here.split("+")[0] != there:
            found.append(f"{package} {here} is installed, measured was {there}")
    return found


def changed(case: Any) -> list[str]:
    """Return what is to be said of a registered case whose fine-tuner is not the one that was measured."""
    return [f"finetune has changed since commit {case.finetune}, which was measured"] if case.finetune else []


def run_dry(case: str, card: str, conf: str, *, timeout: float = 1200) -> dict[str, Any]:
    """Run one case on a dry card, in a process of its own.

    Returns:
        What program.py wrote.

    Raises:
        RuntimeError: the program failed; the message ends with what it said last.
    """
    with tempfile.TemporaryDirectory(prefix="truth-") as folder:
        out = Path(folder) / "marks.json"
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        variables.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        # What was compiled before is not compiled again, and compiling takes memory: the card started with nothing.
        variables["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        if conf:
            variables.update(PYTORCH_CUDA_ALLOC_CONF=conf, PYTORCH_ALLOC_CONF=conf)
        command = [sys.executable, "-m", "pytest_vram", "run", "--gpu", card, "--"]
        done = subprocess.run(
            [*command, str(HERE / "program.py"), case, str(out)],
            env=variables,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode or not out.exists():
            raise RuntimeError(f"{case} failed dry: {(done.stdout + done.stderr)[-3000:]}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def beside(case: str, measured: dict[str, Any], dry: dict[str, Any]) -> Beside:
    """Put one case's measured and dry marks together.

    Raises:
        ValueError: they are not marks of the same phases.
    """
    pairs = list(zip(measured["marks"], dry["marks"], strict=False))
    phases = [[mark["phase"] for mark in marks["marks"]] for marks in (measured, dry)]
    if phases[0] != phases[1]:
        raise ValueError(f"{case}: measured phases {phases[0]}, dry phases {phases[1]}")

    notes = tuple(decode(Note, note) for note in dry.get("notes", ()))

    def peaks(key: str) -> tuple[int, int]:
        return max(m[key] for m, _ in pairs), max(d[key] for _, d in pairs)

    return Beside(
        case=case,
        allocated=peaks("peak_allocated"),
        reserved=peaks("peak_reserved"),
        allocations=peaks("allocations"),
        exact_marks=(len(pairs), sum(m == d for m, d in pairs)),
        notes=notes,
        outside=tuple(
            f"{m['phase']} {key}"
            for m, d in pairs
            for key in ("peak_allocated", "peak_reserved")
            if (spread := spread_of(d[key], notes, allocated=key == "peak_allocated")) is not None
            and not spread.low <= m[key] <= spread.high
        ),
    )


def bounds_lines(row: Beside) -> list[str]:
    """The bounds of the highest dry peaks, and the measured peaks that lie outside of theirs."""
    found = [
        f"{what} between {spread.low} and {spread.high} ({100 * (spread.high - spread.low) / dry:.1f}% apart)"
        for what, (_, dry) in (("allocated", row.allocated), ("reserved", row.reserved))
        if (spread := spread_of(dry, row.notes, allocated=what == "allocated")) is not None
    ]
    return found + [f"OUTSIDE of the bounds: {peak}" for peak in row.outside]


def context_lines(measured: dict[str, int], dry: dict[str, int]) -> list[str]:
    """What a card holds beside torch's allocator, at each moment it was read."""
    return [
        f"  {name:<40} {value / 2**20:>11,.1f} {dry[name] / 2**20:>11,.1f} {percent(value, dry[name]):>+8.2f}%"
        for name, value in measured.items()
    ]


def phase_lines(measured: dict[str, Any], dry: dict[str, Any]) -> list[str]:
    """One line a phase: peak allocated, peak reserved and number of allocations, measured and dry."""
    lines = []
    for m, d in zip(measured["marks"], dry["marks"], strict=True):
        figures = [
            f"{m[key] / unit:>10,.1f} {d[key] / unit:>10,.1f}"
            for key, unit in (
                ("peak_allocated", 2**20),
                ("allocated", 2**20),
                ("peak_reserved", 2**20),
                ("allocations", 1),
            )
        ]
        lines.append(f"  {m['phase']:<24} " + "  ".join(figures))
    return lines


def main() -> int:
    """Print the table; the exit code is 1 when a case could not be run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="by default all that were measured")
    parser.add_argument("--measured", default="h200", metavar="NAME", help="the measured card (default h200)")
    parser.add_argument("--phases", action="store_true", help="show each phase of each case too")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    arguments = parser.parse_args()
    truth = load(arguments.measured)
    registered = registry()
    names = arguments.cases or list(truth.cases)
    if unknown := [name for name in names if name not in truth.cases]:
        parser.error(f"no case {', '.join(unknown)} was measured; there are {', '.join(sorted(truth.cases))}")
    for line in sorted({line for name in names for line in differing(truth, registered[name].packages)}):
        print(f"note: {line}")
    print(f"{'case':<34} {'measured':>14} {'dry':>14} {'off':>9} {'reserved off':>13} {'allocations':>15}  exact marks")
    failed = 0
    results = {}
    for name in names:
        try:
            dry = run_dry(name, truth.card, registered[name].conf)
            row = beside(name, truth.cases[name], dry)
        except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
            failed = 1
            print(f"{name:<34} {str(error).strip().splitlines()[-1][:100]}", flush=True)
            continue
        results[name] = dry
        print(
            f"{name:<34} {row.allocated[0]:>14} {row.allocated[1]:>14} {row.allocated_off:>+8.3f}% "
            f"{row.reserved_off:>+12.3f}% {row.allocations[0]:>7}/{row.allocations[1]:<7} "
            f"{row.exact_marks[1]:>4} of {row.exact_marks[0]}",
            flush=True,
        )
        for line in (*changed(registered[name]), *note_lines(row.notes), *bounds_lines(row)):
            print(f"  note: {line}", flush=True)
        if arguments.phases:
            print("\n".join(phase_lines(truth.cases[name], dry)), flush=True)
        if truth.cases[name]["context"]:
            print("\n".join(context_lines(truth.cases[name]["context"], dry["context"])), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return failed


def registry() -> dict[str, Any]:
    """The cases by name. Importing them imports torch."""
    import language  # noqa: F401 - registers its cases
    import layers  # noqa: F401 - registers its cases
    from marks import CASES

    return CASES


if __name__ == "__main__":
    sys.exit(main())
