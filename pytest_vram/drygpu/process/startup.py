"""Set up a process with dry GPUs as soon as it has imported torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vram.drygpu import driver
from pytest_vram.drygpu.process.quiesce import quiesce_at_exit
from pytest_vram.drygpu.process.torch_import import after_torch
from pytest_vram.drygpu.process.variables import PROCESSES_VARIABLE, RECORD_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping

SITE_FOLDER = Path(__file__).parent / "inherited"
"""``inherited`` adds this folder to ``PYTHONPATH``, so that every child process runs the ``sitecustomize`` in it."""


def inherited(base: Mapping[str, str]) -> dict[str, str]:
    """Return the variables, added to ``base``, with which Python child processes carry values on their dry GPUs too."""
    before = [path for path in base.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != SITE_FOLDER]
    return {"PYTHONPATH": os.pathsep.join([str(SITE_FOLDER), *before])}


def watch() -> None:
    """Call :func:`torch_is_there` when torch is imported; at once if it already is."""
    if not driver.is_active():
        return
    after_torch(torch_is_there)


def torch_is_there() -> None:
    """Set up a process that has just imported torch: carry values, and record its figures if that is requested."""
    if os.environ.get(PROCESSES_VARIABLE):
        from pytest_vram.probe import reporter

        reporter.begin()
    if not driver.is_active():
        return
    from pytest_vram.drygpu.values import carry

    carry.install()
    quiesce_at_exit()
    folder = os.environ.get(RECORD_VARIABLE)
    if folder:
        from pytest_vram.drygpu.process import record

        record.begin(Path(folder))
