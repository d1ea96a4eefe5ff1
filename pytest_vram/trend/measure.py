"""Run pytest in a folder, in a separate process that writes a report."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from pytest_vram.trend.repository import environment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_GRACE = 5.0


class OutOfTimeError(Exception):
    """The session did not end within its time limit, and was ended."""


def run_pytest(
    arguments: Sequence[str],
    *,
    folder: Path,
    outputs: Sequence[Path] = (),
    gpu: str | None = None,
    variables: Mapping[str, str] | None = None,
    quiet: bool = False,
    seconds: float | None = None,
) -> int:
    """Run pytest with this plugin, and return its exit code.

    Args:
        arguments: pytest's arguments.
        folder: the folder to run in.
        outputs: the files to write the report to.
        gpu: the value of ``--vram-gpu``; ``None`` leaves it to the project's settings.
        variables: environment variables to set.
        quiet: do not show what pytest prints.
        seconds: the time limit.

    Raises:
        OutOfTimeError: if the time limit was reached. The session and its child processes have then been ended.
    """
    # `-p vram` loads the plugin even if PYTEST_DISABLE_PLUGIN_AUTOLOAD is set; otherwise it changes nothing.
    command = [sys.executable, "-m", "pytest", "-p", "vram"]
    command += [f"--vram-output={path}" for path in outputs]
    command += [] if gpu is None else [f"--vram-gpu={gpu}"]
    process = subprocess.Popen(
        [*command, *arguments],
        cwd=folder,
        env=environment() | dict(variables or {}),
        stdout=subprocess.DEVNULL if quiet else None,
        stderr=subprocess.DEVNULL if quiet else None,
        start_new_session=seconds is not None,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired as error:
        _end(process)
        raise OutOfTimeError from error
    except BaseException:
        _end(process)
        raise


def sources(tree: Path, folder: str) -> dict[str, str]:
    """Return environment variables that make Python import a checkout's own modules instead of installed ones.

    Args:
        tree: the top of the checkout.
        folder: the path from the top to the folder that the tests run in.
    """
    places = [tree / folder, tree / folder / "src", tree, tree / "src"]
    paths = [str(place) for place in dict.fromkeys(places) if place.is_dir()]
    inherited = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([*paths, *([inherited] if inherited else [])])}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a session and its child processes; signals that let fixtures be torn down come first, SIGKILL last."""
    group = hasattr(os, "killpg") and os.getpgid(process.pid) == process.pid if process.poll() is None else False
    for number in (signal.SIGINT, signal.SIGTERM):
        if process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, number) if group else process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
    if group:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait()
