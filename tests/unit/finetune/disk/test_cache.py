"""The folder of converted models and tokenized data follows the environment variables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.disk.cache import cache_folder

if TYPE_CHECKING:
    import pytest


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    monkeypatch.setenv("FINETUNE_CACHE", "/chosen")
    assert cache_folder() == Path("/chosen")
    monkeypatch.delenv("FINETUNE_CACHE")
    assert cache_folder() == Path("/elsewhere/finetune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/finetune"
