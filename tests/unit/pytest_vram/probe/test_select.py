"""The choice of a probe where torch is not installed, or is not a whole package."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from pytest_vram.errors import ProbeUnavailable
from pytest_vram.probe import select

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=[None, SimpleNamespace(origin=None)], ids=["not there", "an empty folder of that name"])
def no_torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(select.importlib.util, "find_spec", lambda name: request.param)
    select.torch_build.cache_clear()
    yield
    select.torch_build.cache_clear()


@pytest.mark.parametrize("kind", ["auto", "dry", "cuda", "host"])
@pytest.mark.usefixtures("no_torch")
def test_a_session_without_torch_is_told_what_to_install(kind: str) -> None:
    with pytest.raises(ProbeUnavailable, match=r"torch is not installed.*pip install torch"):
        select.choose(select.Choice(kind=kind))
