from __future__ import annotations

import itertools
from typing import Any

import pytest

from pytest_vram.trend import growth, page, text
from pytest_vram.trend.sessions import Entry, Session, Size

_minutes = itertools.count()


def session(
    commit: str | None, *, dirty: bool = False, complete: bool = True, torch: str = "2", **peaks: int
) -> Session:
    minute = next(_minutes)
    entries = tuple(Entry(nodeid=n, card="a card (dry)", peak_bytes=p, complete=complete) for n, p in peaks.items())
    at = f"2026-01-{minute // 1440 + 1:02}T{minute // 60 % 24:02}:{minute % 60:02}:00+00:00"
    return Session(
        at=at,
        commit=commit,
        committed=at if commit else None,
        subject=f"<{commit}>",
        dirty=dirty,
        torch=torch,
        entries=entries,
    )


def line(*commits: str) -> dict[str, tuple[str, ...]]:
    return {commit: (commits[i - 1],) if i else () for i, commit in enumerate(commits)}


def grown(sessions: list[Session], parents: Any, **options: Any) -> list[tuple[str | None, str | None]]:
    found = growth.trend(sessions, parents, tolerance=2, **options).series
    return [(g.before.session.commit, g.after.session.commit) for series in found for g in series.growths]


BIG = 1_000_000


def test_a_growth_is_named_with_the_measured_commits_around_it() -> None:
    sessions = [session("a", t=BIG), session("d", t=2 * BIG), session("b", t=BIG)]
    assert grown(sessions, line("a", "b", "c", "d")) == [("b", "d")]


def test_a_merge_is_compared_with_the_larger_of_its_parents() -> None:
    parents = {"a": (), "f": ("a",), "b": ("a",), "m": ("b", "f")}
    sessions = [session(c, t=p) for c, p in (("a", BIG), ("f", 2 * BIG), ("b", BIG), ("m", 2 * BIG))]
    assert grown(sessions, parents) == [("a", "f")], "neither b's neighbour in the list nor the merge itself grew"
    assert grown([*sessions[:3], session("m", t=3 * BIG)], parents) == [("a", "f"), ("f", "m")]


def test_a_peak_that_creeps_up_is_noticed_once_it_is_past_the_tolerance() -> None:
    sessions = [session(c, t=BIG + i * BIG // 100) for i, c in enumerate("abcd")]
    assert grown(sessions, line(*"abcd")) == [("a", "d")]


def test_a_test_that_shrank_and_grew_again_is_compared_with_the_low() -> None:
    sessions = [session(c, t=p) for c, p in zip("abc", (2 * BIG, BIG, 2 * BIG), strict=True)]
    assert grown(sessions, line(*"abc")) == [("b", "c")]


def test_the_last_session_of_a_commit_counts_for_the_tests_that_it_ran() -> None:
    sessions = [session("a", t=BIG, u=BIG), session("b", t=9 * BIG, u=9 * BIG), session("b", t=BIG)]
    found = growth.trend(sessions, line("a", "b"), tolerance=2).series
    assert {series.nodeid: len(series.growths) for series in found} == {"t": 0, "u": 1}


def test_uncommitted_changes_other_branches_and_failed_tests_are_left_out_and_counted() -> None:
    sessions = [
        session("a", t=BIG),
        session("a", t=5 * BIG, dirty=True),
        session("x", t=5 * BIG),
        session("b", t=1, complete=False),
        session("c", t=BIG),
    ]
    found = growth.trend(sessions, line("a", "b", "c"), tolerance=2)
    assert [len(series.points) for series in found.series] == [2]
    assert [len(series.growths) for series in found.series] == [0]
    assert found.remarks == (
        "1 session measured uncommitted changes: left out, --all shows them",
        "1 session measured commits that the current one does not descend from: left out, --all shows them",
        "1 measurement of failed tests left out: such a test may end before its peak",
    )
    shown = growth.trend(sessions, line("a", "b", "c"), tolerance=2, everything=True)
    labels = [growth.label(point.session) for point in shown.series[0].points]
    assert labels == ["a", "a+changes", "c", "x"]


def test_without_git_the_dates_give_the_order() -> None:
    sessions = [session("b", t=BIG), session(None, t=2 * BIG), session("c", t=2 * BIG)]
    found = growth.trend(sessions, None, tolerance=2, why="no git here")
    assert found.remarks == ("the commits are in the order of their dates: no git here",)
    assert [growth.label(g.after.session)[:9] for g in found.series[0].growths] == ["no commit"]


def test_the_terminal_names_commit_parts_and_versions() -> None:
    def with_parts(session: Session, size: int) -> Session:
        (entry,) = session.entries
        lines = (Size(name="model.py:3 in f", size_bytes=size), Size(name="same.py:1 in g", size_bytes=5))
        fields = {name: getattr(session, name) for name in ("at", "commit", "committed", "subject", "torch")}
        changed = Entry(nodeid="t", card=entry.card, peak_bytes=entry.peak_bytes, lines=lines)
        return Session(**fields, entries=(changed,))

    before, after = session("a" * 40, t=2**30), session("b" * 40, t=2**31, torch="3")
    sessions = [with_parts(before, 2**20), with_parts(after, 2**30)]
    found = growth.trend(sessions, line("a" * 40, "x", "b" * 40), tolerance=2)
    shown = text.render(found, width=100, between=lambda a, b: 1)
    assert shown.splitlines() == [
        "t on a card (dry)",
        "  1.00 GiB ▅█ 2.00 GiB, 2 commits",
        f"  grew +100.0% (1.00 GiB -> 2.00 GiB) at {'b' * 9} <{'b' * 40}>",
        f"    since {'a' * 9} <{'a' * 40}>; 1 commit between them not measured: --bisect finds the one",
        "    model.py:3 in f +1023 MiB",
        "    versions changed as well: torch 2 -> 3",
    ]


def test_the_page_is_one_file_without_script_and_escapes_what_it_shows() -> None:
    sessions = [session("a", **{"<t>": BIG}), session("b", **{"<t>": 2 * BIG})]
    html = page.render(growth.trend(sessions, line("a", "b"), tolerance=2))
    assert "<script" not in html
    assert "<t>" not in html
    assert "&lt;t&gt;" in html
    assert html.count("<circle") == 2
    assert html.count('class="grown"') == 1
    assert "&lt;b&gt;" in html, "the subject of the commit"
    assert "http://" not in html
    assert "https://" not in html


def test_a_page_without_a_test_and_one_with_a_single_commit() -> None:
    assert "0 tests" in page.render(growth.Trend(series=(), remarks=()))
    found = growth.trend([session("a", t=BIG)], line("a"), tolerance=2)
    assert page.render(found).count("<circle") == 1
    assert text.render(found, width=80).splitlines()[1].endswith("1 commit")


@pytest.mark.parametrize(
    ("sizes", "drawn"),
    [([1, 2, 3], "▃▆█"), ([100, 100], "▄▄"), ([0, 10], "▁█"), ([1000, 1001], "▅█"), ([], "")],
)
def test_bars(sizes: list[int], drawn: str) -> None:
    assert text.bars(sizes) == drawn


def test_a_commit_that_was_measured_and_did_not_shrink_is_not_called_unmeasured() -> None:
    """The growth is over the smallest peak since the last one, and "b" lies between, measured."""
    names = [letter * 40 for letter in "abcd"]
    sizes = (2**30, 2**30 + 2**20, None, 2**31)
    sessions = [session(name, t=size) for name, size in zip(names, sizes, strict=True) if size]
    found = growth.trend(sessions, line(*names), tolerance=2)
    (grown,) = found.series[0].growths
    assert (grown.before.session.commit, grown.passed) == (names[0], 1)
    assert "; 1 commit between them not measured" in text.render(found, width=100, between=lambda a, b: 2)
    assert "not measured" not in text.render(found, width=100, between=lambda a, b: 1)
