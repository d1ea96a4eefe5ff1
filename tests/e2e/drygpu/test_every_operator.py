"""Every operator of PyTorch's own database runs on a dry GPU, and what is known of its results is right.

The continuous tests take a sample. ``HYPOTHESIS_PROFILE=nightly`` takes all of them, which is some minutes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
PARTS = 40
"""The database is cut into so many parts, the operators dealt out like cards."""

pytest.importorskip("expecttest")  # the module of the database imports it


@pytest.mark.parametrize("part", range(PARTS) if NIGHTLY else [7])
def test_operators_run_and_what_is_known_is_right(run_program: Callable[..., dict[str, Any]], part: int) -> None:
    found = run_program("every_operator.py", str(part), str(PARTS))

    assert found["run"] > 10
    assert found["wrong"] == []
