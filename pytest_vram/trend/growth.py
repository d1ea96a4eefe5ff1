"""Follow the peak of each test along the commits, and find the commits at which it grew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_vram.memory.report import grew

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_vram.trend.sessions import Entry, Session, Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The peak of one test at one commit, with the last session that measured it and what the session measured."""

    session: Session
    entry: Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """A growth of a test's peak by more than the tolerance.

    Attributes:
        before: the commit that the peak is compared with: the one with the smallest peak since the last growth. So a
            peak that grows in small steps is noticed too.
        after: the commit at which the peak is larger.
        passed: how many commits between them were measured, and had no smaller peak.
    """

    before: Point
    after: Point
    passed: int = 0

    @property
    def percent(self) -> float:
        """The growth in percent."""
        old, new = self.before.entry.peak_bytes, self.after.entry.peak_bytes
        return (new - old) / old * 100

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """The categories and then the lines that grew, and by how many bytes, the largest growth of each first."""
        return (
            *_grown(self.before.entry.categories, self.after.entry.categories),
            *_grown(self.before.entry.lines, self.after.entry.lines),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakHistory:
    """One test on one card, over the commits."""

    nodeid: str
    card: str
    points: tuple[Point, ...]
    growths: tuple[Growth, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """All series, with remarks on what was left out.

    Attributes:
        series: the tests; those that grew come first.
        remarks: sentences on what was left out, and on the order of the commits.
    """

    series: tuple[PeakHistory, ...]
    remarks: tuple[str, ...]


def trend(
    sessions: Sequence[Session],
    parents: Mapping[str, tuple[str, ...]] | None,
    *,
    tolerance: float,
    everything: bool = False,
    why: str = "",
) -> Trend:
    """Return the trend of every test.

    Args:
        sessions: the history, in the order in which the sessions began.
        parents: each commit of the head's history and its parents, ancestors first; ``None`` if git does not know
            them. Then the commits are followed in the order of their dates.
        tolerance: the growth in percent up to which a peak counts as unchanged.
        everything: also follow sessions of uncommitted changes and of commits that are not in the head's history.
        why: why ``parents`` is ``None``.
    """
    kept, remarks = list(sessions), []
    if not everything:
        kept = [session for session in kept if not session.dirty]
        remarks += _left_out(len(sessions) - len(kept), "measured uncommitted changes")
        if parents is not None:
            known = [session for session in kept if session.commit in parents]
            remarks += _left_out(len(kept) - len(known), "measured commits that the current one does not descend from")
            kept = known
    if parents is None:
        remarks.append(f"the commits are in the order of their dates: {why}")
    partial = sum(not entry.complete for session in kept for entry in session.entries)
    if partial:
        remarks.append(
            f"{partial} measurement{'s' * (partial > 1)} of failed tests left out: such a test may end before its peak"
        )
    order = _ordered(kept, parents)
    links = _links(order, parents)
    found = []
    for key in dict.fromkeys((e.nodeid, e.card) for session in kept for e in session.entries if e.complete):
        points = {i: point for i, group in enumerate(order) if (point := _last(group, key)) is not None}
        growths = _growths(points, links, tolerance)
        found.append(PeakHistory(nodeid=key[0], card=key[1], points=tuple(points.values()), growths=growths))
    found.sort(key=lambda series: (not series.growths, -max((g.percent for g in series.growths), default=0)))
    return Trend(series=tuple(found), remarks=tuple(remarks))


def label(session: Session) -> str:
    """Return the name of a commit: its short hash, with ``+changes`` if the tree was dirty."""
    if session.commit is None:
        return f"no commit, {session.at[:16].replace('T', ' ')}"
    return session.commit[:9] + ("+changes" if session.dirty else "")


def versions_changed(growth: Growth) -> str:
    """Return the versions that changed with a growth and may be its reason; ``""`` if none changed."""
    old, new = growth.before.session, growth.after.session
    pairs = (("torch", old.torch, new.torch), ("pytest-vram", old.pytest_vram, new.pytest_vram))
    return ", ".join(f"{name} {before} -> {after}" for name, before, after in pairs if before != after)


def _left_out(count: int, what: str) -> list[str]:
    return [f"{count} session{'s' * (count > 1)} {what}: left out, --all shows them"] if count else []


def _ordered(sessions: Sequence[Session], parents: Mapping[str, tuple[str, ...]] | None) -> list[list[Session]]:
    """Return the sessions grouped by commit, ancestors first. Uncommitted changes follow their commit."""
    position = {commit: i for i, commit in enumerate(parents or ())}
    groups: dict[object, list[Session]] = {}
    for session in sessions:
        key = session.at if session.commit is None or session.dirty else session.commit
        groups.setdefault(key, []).append(session)

    def rank(group: list[Session]) -> tuple[int, str, bool, str]:
        first = group[0]
        place = position.get(first.commit or "", len(position))
        return place, "" if place < len(position) else _moment(first), first.dirty, first.at

    return sorted(groups.values(), key=rank)


def _moment(session: Session) -> str:
    """Return a text that sorts as the commit's date does, whatever its time zone."""
    import datetime

    return datetime.datetime.fromisoformat(session.committed or session.at).astimezone(datetime.UTC).isoformat()


def _links(order: Sequence[Sequence[Session]], parents: Mapping[str, tuple[str, ...]] | None) -> list[set[int]]:
    """Return, for each group of ``order``, the positions of the groups that it is compared with.

    These are the nearest measured ancestors, several after a merge; without ``parents``, the group before it.
    """
    if parents is None:
        return [{i - 1} if i else set() for i in range(len(order))]
    clean = {group[0].commit: i for i, group in enumerate(order) if not group[0].dirty}
    nearest: dict[str, set[int]] = {}
    links: list[set[int]] = [set() for _ in order]
    for commit, above in parents.items():
        found = set().union(*(nearest.get(parent, set()) for parent in above))
        at = clean.get(commit)
        if at is not None:
            links[at] = found
        nearest[commit] = found if at is None else {at}
    for i, group in enumerate(order):
        if group[0].dirty or group[0].commit not in parents:
            links[i] = set(nearest.get(group[0].commit or "", ())) or ({i - 1} if i else set())
    return links


def _last(group: Sequence[Session], key: tuple[str, str]) -> Point | None:
    """Return what the last session of a commit measured for one test."""
    for session in reversed(group):
        for entry in session.entries:
            if (entry.nodeid, entry.card) == key and entry.complete:
                return Point(session=session, entry=entry)
    return None


def _growths(points: Mapping[int, Point], links: Sequence[set[int]], tolerance: float) -> tuple[Growth, ...]:
    """Return the growths, comparing each point with the largest reference of its ancestors.

    A reference is the smallest peak since the last growth, so that a peak that grows in small steps is noticed.
    """
    references: dict[int, tuple[Point, int]] = {}
    found = []
    for i, above in enumerate(links):
        inherited = [references[link] for link in above if link in references]
        largest = max(inherited, key=lambda reference: reference[0].entry.peak_bytes, default=None)
        before, passed = largest or (None, 0)
        point = points.get(i)
        if point is None:
            if before is not None:
                references[i] = before, passed
        elif before is not None and grew(before.entry.peak_bytes, point.entry.peak_bytes, tolerance):
            found.append(Growth(before=before, after=point, passed=passed))
            references[i] = point, 0
        elif before is None or point.entry.peak_bytes <= before.entry.peak_bytes:
            references[i] = point, 0
        else:
            references[i] = before, passed + (not point.session.dirty)
    return tuple(found)


def _grown(old: Sequence[Size], new: Sequence[Size]) -> list[tuple[str, int]]:
    if not old or not new:
        return []
    before = {size.name: size.size_bytes for size in old}
    found = [(size.name, size.size_bytes - before.get(size.name, 0)) for size in new]
    return sorted(((name, size) for name, size in found if size > 0), key=lambda item: -item[1])
