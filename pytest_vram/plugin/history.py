"""Adds a session's peaks to a history, with the commit that was checked out when the session began."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_vram.trend import sessions
from pytest_vram.trend.repository import head

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_vram.memory import Report


class HistoryWriter:
    """Adds a session to a history; it asks git for the commit at the start, because one may be made during the tests.

    Args:
        folder: the history's folder.
        root: pytest's root folder.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self._folder, self._at = folder, sessions.now()
        self._head = head(root, without=folder)

    def write(self, report: Report) -> list[str]:
        """Add the session, and return notes on it.

        Raises:
            OSError: if the file cannot be written.
        """
        found = sessions.session(report, self._head, self._at)
        if not found.entries:
            return ["nothing was measured, so nothing was added to the history"]
        path = sessions.write(self._folder, found)
        count = len(found.entries)
        notes = [f"{count} peak{'s' * (count > 1)} added to the history: {path}"]
        if self._head.commit is None:
            notes.append(f"the history does not know the commit of this session: {self._head.problem}")
        elif self._head.dirty:
            notes.append("the tree has uncommitted changes, so `history` leaves this session out unless --all is given")
        return notes
