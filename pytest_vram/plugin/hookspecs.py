"""Hooks of this plugin, for other plugins and for ``conftest.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_vram.memory import TestRecord
    from pytest_vram.probe.protocol import Probe


@pytest.hookspec(firstresult=True)
def pytest_vram_probe(config: pytest.Config) -> Probe | None:
    """Return a probe to measure with, in place of the built-in ones, or None to use a built-in one.

    The hook is called once in each process, when the first test needs a probe.
    """


@pytest.hookspec
def pytest_vram_record(item: pytest.Item, record: TestRecord) -> None:
    """Receive the record of a test that was measured, before its report is made, in the process that ran it.

    Where a device was measured, ``host``, leaks and processes left behind are found out afterwards: the record of the
    report has them, and this one does not yet.
    """
