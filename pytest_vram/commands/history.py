"""The command ``python -m pytest_vram history``: draw each test over commits, and find the commit at which it grew."""

from __future__ import annotations

import fnmatch
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vram.errors import VramUsageError
from pytest_vram.report import disk

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from pytest_vram.trend.growth import PeakHistory, Trend

DEFAULT = Path("vram-history")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "history",
        help="draw each test's peak over commits, and find the commit at which it grew",
        description="Draw each test's peak over the commits that --vram-history recorded, and name those at which it"
        " grew. With --bisect, measure the commits between with git bisect; the working tree stays as it is.",
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", default=DEFAULT, help=f"a folder that --vram-history wrote (default: {DEFAULT})"
    )
    parser.add_argument("--test", metavar="PATTERN", default="*", help="show the tests whose name contains PATTERN")
    parser.add_argument(
        "--tolerance", type=float, default=2.0, metavar="PCT", help="growth that does not count (default: 2)"
    )
    parser.add_argument("--all", action="store_true", help="show uncommitted changes and other branches too")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT.html", help="write a page as well")
    parser.add_argument("--bisect", metavar="TEST", help="run git bisect until the commit is found at which TEST grew")
    parser.add_argument(
        "--good", metavar="REV", help="with --bisect: a commit with a small peak (default: from history)"
    )
    parser.add_argument("--bad", metavar="REV", help="with --bisect: a later one with a larger peak")
    parser.add_argument(
        "--gpu", metavar="GPU", help="with --bisect: the value of --vram-gpu (default: the card of the history)"
    )
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Print the trend, or search for the commit at which a test grew; return 0.

    Raises:
        VramUsageError: if the history cannot be read, or the search cannot be made.
    """
    if args.bisect is not None:
        return _bisect(args)
    if args.output is not None and args.output.suffix != ".html":
        raise VramUsageError(f"history --output {args.output}: it is a page; name it {args.output.stem}.html")
    from pytest_vram.trend import page, text

    trend = _trend(args)
    pattern = args.test if any(character in args.test for character in "*?") else f"*{args.test}*"
    # Square brackets are part of node ids, so they are matched literally.
    pattern = pattern.replace("[", "[[]")
    shown = replace(trend, series=tuple(s for s in trend.series if fnmatch.fnmatchcase(s.nodeid, pattern)))
    if trend.series and not shown.series:
        raise VramUsageError(f"--test {args.test}: no test of the history has such a name; {_names(trend.series)}")
    between = _between(Path.cwd())
    print(text.render(shown, width=shutil.get_terminal_size().columns, between=between))
    if args.output is not None:
        disk.write_atomically(args.output, page.render(shown, between=between))
        print(f"written to {args.output}")
    return 0


def _trend(args: argparse.Namespace) -> Trend:
    from pytest_vram.trend import growth, sessions
    from pytest_vram.trend.repository import GitError, parents

    found = sessions.read(args.folder)
    try:
        known, why = parents(Path.cwd()), ""
    except GitError as error:
        known, why = None, str(error)
    return growth.trend(found, known, tolerance=args.tolerance, everything=args.all, why=why)


def _between(folder: Path) -> Callable[[str, str], int | None]:
    from pytest_vram.trend.repository import GitError, commits_between

    def between(before: str, after: str) -> int | None:
        try:
            return commits_between(before, after, folder)
        except GitError:
            return None

    return between


def _bisect(args: argparse.Namespace) -> int:
    from pytest_vram.trend import bisect
    from pytest_vram.trend.repository import git, head
    from pytest_vram.units import format_bytes

    here = Path.cwd()
    good, bad, gpu, folder = args.good, args.bad, args.gpu, None
    if good is None or bad is None or gpu is None:
        series = _series(args)
        if good is None or bad is None:
            if not series.growths:
                raise VramUsageError(
                    f"{args.bisect} did not grow by more than {args.tolerance:g}% in {args.folder}: name the commits to"
                    " search between with --good and --bad"
                )
            growth = series.growths[-1]
            good = good or growth.before.session.commit
            bad = bad or growth.after.session.commit
        gpu = gpu or _gpu(series)
        folder = series.points[-1].session.folder
    if good is None or bad is None:
        raise VramUsageError(f"{args.folder} names no commit for {args.bisect}: name them with --good and --bad")
    if folder is None:
        folder = head(here).folder
    print(f"{args.bisect} between {good[:9]} and {bad[:9]}, with --vram-gpu={gpu}")
    search = bisect.Search(nodeid=args.bisect, good=good, bad=bad, gpu=gpu, tolerance=args.tolerance, folder=folder)
    found = bisect.bisect(search, here, lambda line: print(f"  {line}", flush=True))
    told = [git("log", "-1", "--format=%h %s (%an, %cs)", commit, folder=here) for commit in found.commits]
    sizes = f"from {format_bytes(found.before_bytes)} to {format_bytes(found.after_bytes)}"
    if len(told) == 1:
        print(f"grew {sizes} at {told[0]}")
    else:
        print(
            f"grew {sizes} at one of these, which could not all be measured:", *(f"  {line}" for line in told), sep="\n"
        )
    return 0


def _series(args: argparse.Namespace) -> PeakHistory:
    found = [series for series in _trend(args).series if series.nodeid == args.bisect]
    if not found:
        raise VramUsageError(
            f"--bisect {args.bisect}: {args.folder} has no such test;"
            f" {_names(_trend(args).series)}. Or name the commits and the card with --good, --bad and --gpu"
        )
    return next((series for series in found if series.growths), found[0])


def _gpu(series: PeakHistory) -> str:
    """Return the value of ``--vram-gpu`` that measures on the card of a series."""
    from pytest_vram.drygpu.cards import CARDS

    name, _, kind = series.card.removesuffix(")").rpartition(" (")
    if kind in ("host", "cuda", "nvml"):
        return kind
    card = next((card.name for card in CARDS if card.product == name), None)
    if kind != "dry" or card is None:
        raise VramUsageError(f"{series.nodeid} was measured on {series.card}: name the device to measure on with --gpu")
    return f"dry:{card}"


def _names(series: Sequence[PeakHistory]) -> str:
    names = list(dict.fromkeys(one.nodeid for one in series))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"it has {', '.join(names[:5])}{more}" if names else "it has none at a commit that is shown"
