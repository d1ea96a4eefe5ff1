"""The command ``python -m pytest_vram ci``: the steps of a CI job, and the pre-commit hook."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vram.errors import VramUsageError
from pytest_vram.probe.select import DEFAULT_CARD

if TYPE_CHECKING:
    from pytest_vram.ci.github import Job

FOLDER = Path("vram-ci")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command and its parts."""
    parser = subparsers.add_parser(
        "ci",
        help="measure and publish in a CI job; run budgets before a commit",
        description="The steps of a CI job that measures a change and its base and says what grew, and the hook that "
        "runs budgets before a commit.",
    )
    parts = parser.add_subparsers(title="parts", required=True, metavar="PART")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--into", type=Path, default=FOLDER, metavar="DIR", help=f"the folder that the parts share (default: {FOLDER})"
    )

    measure = _part(parts, "measure", "run the tests and write the report; ends with pytest's exit code", [shared])
    _add_gpu(measure)
    _add_arguments(measure)
    measure.set_defaults(main=_measure)

    base = _part(parts, "base", "measure the commit that the change is based on, in a worktree of its own", [shared])
    base.add_argument("--rev", metavar="REV", help="the commit (default: the base of the pull request)")
    _add_gpu(base)
    _add_arguments(base)
    base.set_defaults(main=_base)

    publish = _part(
        parts, "publish", "annotate lines, write the summary and the page, comment on the pull request", [shared]
    )
    publish.add_argument(
        "--tolerance", type=float, default=2.0, metavar="PCT", help="growth that does not count (default: 2)"
    )
    publish.add_argument("--name", default="", help="tells the comments of several jobs on one pull request apart")
    publish.add_argument("--comment", action="store_true", help="comment on the pull request, with GITHUB_TOKEN")
    publish.add_argument("--fail-on-growth", action="store_true", help="end with 1 if a test grew over the base")
    publish.set_defaults(main=_publish)

    hook = _part(parts, "hook", "run the budgets of changed test files; pre-commit calls this", [])
    _add_gpu(hook)
    hook.add_argument("--seconds", type=float, default=120, help="the time limit (default: 120)")
    hook.add_argument("--pytest-args", default="", metavar="TEXT", help="more arguments for pytest, as in a shell")
    hook.add_argument("files", nargs="*", help="the test files")
    hook.set_defaults(main=_hook)


def _part(
    parts: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    parents: list[argparse.ArgumentParser],
) -> argparse.ArgumentParser:
    """Add a part, whose own ``--help`` begins with the text that the list of parts shows."""
    return parts.add_parser(name, parents=parents, help=text, description=f"{text[0].upper()}{text[1:]}.")


def _add_gpu(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu",
        default=DEFAULT_CARD,
        metavar="CARD",
        help=f"the card to imitate, or another value of --vram-gpu (default: {DEFAULT_CARD})",
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pytest-args", default="", metavar="TEXT", help="arguments for pytest, as in a shell")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENTS", help="arguments for pytest")


def _measure(args: argparse.Namespace) -> int:
    from pytest_vram.ci.measure import AFTER, measure

    code = measure(args.into, _arguments(args), gpu=_gpu(args.gpu), folder=Path.cwd())
    if not (args.into / AFTER).exists():
        said = (
            f"pytest ended with exit code {code}, and without a report: its output says why; `-p no:vram` prevents one"
        )
        print(f"pytest_vram: {said}", file=sys.stderr)
        return code or 1
    return code


def _base(args: argparse.Namespace) -> int:
    """Measure the base; one that cannot be measured is reported but is no failure, because the change was measured."""
    from pytest_vram.ci.measure import measure_base
    from pytest_vram.report.workflow import command

    revision = args.rev or _job().base
    if revision is None:
        raise VramUsageError(
            "ci base: this job is not for a pull request, so there is no base; name a commit with --rev"
        )
    problem = measure_base(args.into, revision, _arguments(args), gpu=_gpu(args.gpu), folder=Path.cwd())
    if problem:
        print(command("notice", problem, title="GPU memory: no comparison"), flush=True)
    return 0


def _publish(args: argparse.Namespace) -> int:
    from pytest_vram.ci.publish import publish

    grown = publish(
        args.into,
        _job(),
        folder=Path.cwd(),
        tolerance=args.tolerance,
        name=args.name,
        comments=args.comment,
        tell=lambda line: print(line, flush=True),
    )
    return int(args.fail_on_growth and bool(grown))


def _hook(args: argparse.Namespace) -> int:
    from pytest_vram.ci.hook import check

    if args.seconds <= 0:
        raise VramUsageError(f"--seconds {args.seconds:g}: the time limit is a number of seconds above 0")
    return check(
        args.files,
        _split(args.pytest_args),
        gpu=_gpu(args.gpu),
        seconds=args.seconds,
        folder=Path.cwd(),
        tell=lambda line: print(line, flush=True),
    )


def _job() -> Job:
    from pytest_vram.ci.github import job

    return job(os.environ)


def _gpu(name: str) -> str:
    """Return the value of ``--vram-gpu`` for the name of a card: ``rtx-4080`` is ``dry:rtx-4080``."""
    from pytest_vram.probe.select import parse_choice

    try:
        parse_choice(name)
    except VramUsageError:
        parse_choice(f"dry:{name}")  # for an unknown card, the error names the most similar ones
        return f"dry:{name}"
    return name


def _arguments(args: argparse.Namespace) -> list[str]:
    return [*_split(args.pytest_args), *args.arguments]


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise VramUsageError(f"--pytest-args {text!r} cannot be split as a shell does: {error}") from error
