"""What happens in a process with dry GPUs as soon as it has imported torch."""

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
"""Put on ``PYTHONPATH`` by ``inherited``: its ``sitecustomize`` calls ``watch`` in every Python process below."""


def inherited(base: Mapping[str, str]) -> dict[str, str]:
    """The variables that make child processes carry values too, given the environment ``base``."""
    before = [path for path in base.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != SITE_FOLDER]
    return {"PYTHONPATH": os.pathsep.join([str(SITE_FOLDER), *before])}


def watch() -> None:
    """Carry values from the moment torch is imported; at once, if it is already."""
    if not driver.is_active():
        return
    after_torch(torch_is_there)


def torch_is_there() -> None:
    """Torch is imported: carry values from now on, and record where that is asked for."""
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
