"""A stand-in is found at whatever revision a program asks for, and other models keep theirs."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_vram.standins.revisions import at_any_revision


def asked(
    repo_id: str, filename: str = "", revision: str | None = None, *, repo_type: str | None = None, **others: Any
) -> tuple[Any, ...]:
    """Stand for a function of the library, which takes keywords of its earlier versions too."""
    return repo_id, filename, revision, repo_type, others


CALL = at_any_revision(asked, frozenset({"acme/tiny"}))


@pytest.mark.parametrize("kind", [None, "model"])
def test_the_revision_of_a_stand_in_is_ignored_however_it_is_given(kind: str | None) -> None:
    found = "acme/tiny", "config.json", None, kind, {"proxies": None}
    assert CALL("acme/tiny", "config.json", "v2", repo_type=kind, proxies=None) == found
    assert CALL(filename="config.json", repo_id="acme/tiny", revision="f" * 40, repo_type=kind, proxies=None) == found


@pytest.mark.parametrize(("name", "kind"), [("acme/other", None), ("acme/tiny", "dataset"), ("acme/tiny", "space")])
def test_what_has_no_stand_in_keeps_its_revision(name: str, kind: str | None) -> None:
    assert CALL(name, revision="v2", repo_type=kind)[2] == "v2"
    assert CALL(name, "x", "v2", repo_type=kind)[2] == "v2"
