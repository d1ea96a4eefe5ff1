"""The command line ``python -m pytest_vram``, with the commands run, report, compare, history, ci, cards, doctor.

Each command is a module of :mod:`pytest_vram.commands` with the functions ``add_parser`` and ``main``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import TYPE_CHECKING

from pytest_vram import __version__
from pytest_vram.errors import VramError

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = (
    "pytest_vram.commands.run",
    "pytest_vram.commands.report",
    "pytest_vram.commands.compare",
    "pytest_vram.commands.history",
    "pytest_vram.commands.ci",
    "pytest_vram.commands.cards",
    "pytest_vram.commands.doctor",
)
USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after the program's name; ``None`` takes those of this process.

    Returns:
        The command's exit code, or 2 if an argument cannot be used.
    """
    parser = argparse.ArgumentParser(prog="python -m pytest_vram", description="GPU memory, measured and budgeted.")
    parser.add_argument("--version", action="version", version=f"pytest-vram {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(name).add_parser(subparsers)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.main(arguments))
    except VramError as error:
        print(f"pytest_vram: {error}", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:
        return 0
    except OSError as error:  # a folder that is not there, a disk that is full
        print(f"pytest_vram: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return USAGE_ERROR
