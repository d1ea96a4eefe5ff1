"""The command ``python -m pytest_vram compare A.json B.json``: list the tests that grew, shrank, are new or gone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vram.errors import VramUsageError
from pytest_vram.report import files
from pytest_vram.report.terminal import shorten
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    import argparse

    from pytest_vram.baseline import Change
    from pytest_vram.memory import Report


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "compare",
        help="compare two reports; the exit code is 1 if a peak grew",
        description="List the tests that grew, shrank, are new or gone between two reports. The exit code is 1 "
        "if a peak grew by more than the tolerance.",
    )
    parser.add_argument("before", type=Path, help="a .json file that --vram-output wrote")
    parser.add_argument("after", type=Path, help="another one, written later")
    parser.add_argument("--tolerance", type=float, default=2.0, metavar="PCT", help="growth that passes (default: 2)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="OUT.html", help="write AFTER as an HTML page that shows the growth"
    )
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Print the comparison; return 1 if a peak grew by more than the tolerance, otherwise 0.

    Raises:
        VramUsageError: if a report cannot be read.
    """
    from pytest_vram import baseline

    before, after = files.load(args.before), files.load(args.after)
    text, grown = render(before, after, args.tolerance, shutil.get_terminal_size().columns)
    print(text)
    if args.output is not None:
        if args.output.suffix != ".html":
            raise VramUsageError(
                f"compare --output {args.output}: the comparison is a page; name it {args.output.stem}.html"
            )
        peaks = baseline.peaks(before, failed=True)
        held = baseline.held_against(after, peaks, source=args.before.name, tolerance=args.tolerance)
        files.save(held, args.output, before)
        print(f"written to {args.output}")
    return int(grown)


def render(before: Report, after: Report, tolerance: float, width: int) -> tuple[str, bool]:
    """Return the comparison as text, and whether a peak grew by more than the tolerance."""
    from pytest_vram import baseline

    old, new = baseline.peaks(before, failed=True), baseline.peaks(after, failed=True)
    changes = baseline.compare(after, old, tolerance)
    lines: list[str] = []
    for title, found in (("grew", changes.regressed), ("shrank", changes.improved)):
        if found:
            lines += [f"{title}:", *(_line(change, width) for change in found)]
    for title, names in (("new", baseline.only_in(new, old)), ("gone", baseline.only_in(old, new))):
        if names:
            lines += [f"{title}:", *(f"  {shorten(name, width - 2)}" for name in names)]
    different = {c for cards in old.values() for c in cards} ^ {c for cards in new.values() for c in cards}
    if different and not changes.regressed and not changes.improved:
        lines.append(f"measured on different cards, which are not compared: {', '.join(sorted(different))}")
    return "\n".join(lines) or f"no peak changed by more than {tolerance:g}%", bool(changes.regressed)


def _line(change: Change, width: int) -> str:
    figures = (
        f"  {change.percent_text:>9}  {format_bytes(change.before_bytes):>9} -> {format_bytes(change.after_bytes):<9}  "
    )
    return figures + shorten(change.nodeid, max(12, width - len(figures)))
