"""The command ``python -m pytest_vram report A.json``: show a report, or write it in another format."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vram.report import files, terminal

if TYPE_CHECKING:
    import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "report",
        help="show a report, or write it as .md, .csv, .html or .json",
        description="Show a report in the terminal, or write it in the formats that the suffixes of --output name.",
    )
    parser.add_argument("report", type=Path, help="a .json file that --vram-output wrote")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        action="append",
        default=[],
        help="write the report to this file and do not show it",
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="FILE", help="show the growth since a baseline file or an earlier report"
    )
    parser.add_argument("--tolerance", type=float, default=2.0, metavar="PCT", help="growth that passes (default: 2)")
    parser.add_argument("-v", "--verbose", action="store_true", help="show phases too")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Show or write the report; return 0.

    Raises:
        VramUsageError: if the report or the baseline cannot be read, or there is no format for a suffix.
    """
    report, before = files.load(args.report), None
    if args.baseline is not None:
        from pytest_vram import baseline

        peaks, before = baseline.read_any(args.baseline)
        report = baseline.held_against(report, peaks, source=args.baseline.name, tolerance=args.tolerance)
    for path in args.output:
        files.save(report, path, before)
        print(f"written to {path}")
    if not args.output:
        width = shutil.get_terminal_size().columns
        print(terminal.render(report, width=width, color=sys.stdout.isatty(), verbosity=int(args.verbose)))
    return 0
