"""When the plugin does what: the dry GPU before torch, the runner with the first test that needs it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_vram.errors import VramUsageError
from pytest_vram.plugin import options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_vram.plugin.runner import Runner
    from pytest_vram.plugin.settings import Settings
    from pytest_vram.probe.select import Choice

RUNNER, COLLECTOR = "vram-runner", "vram-collector"
_MOST_FILES = 2_000
_USES = re.compile(rb"\bvram(_ranks)?\b|def \w+\([^)]*\bgpu\b")  # a marker, or one of the fixtures
_NOTICE = pytest.StashKey[str]()


def before_conftests(config: pytest.Config) -> None:
    """Put the dry GPU in place if the user asks for it, or if ``auto`` finds no GPU and a test uses this plugin.

    ``auto`` searches the text of the test files, because it has to decide before the first of them imports torch. It
    leaves the session as it is if no file mentions a marker or a fixture of this plugin.
    """
    wanted = options.early_gpu(config) or "auto"
    if wanted == "auto" and not _mentioned(config):
        return
    from pytest_vram.probe import select

    try:
        choice = select.parse_choice(wanted)
    except VramUsageError:
        return  # configure() reports this error, as it does for every wrong setting
    if choice.kind == "dry":
        _go_dry(config, choice, chosen=f"--vram-gpu={wanted}")
    elif choice.kind == "auto" and select.can_run_dry():
        _go_dry(config, choice, chosen="")


def configure(config: pytest.Config) -> None:
    """Check the settings, and start the runner at once if a setting asks for every test to be measured.

    Raises:
        pytest.UsageError: if a setting cannot be used, or figures are not of the kind that ``--vram-require`` names.
    """
    if not options.asked_for(config):
        return
    settings = _settings(config)
    if settings.require is not None:
        _require(config, settings, settings.require)
    if settings.measures_all:
        start(config)


def start(config: pytest.Config) -> Runner:
    """Register the runner and, in the process that receives the reports, the collector."""
    from pytest_vram.plugin.collector import Collector
    from pytest_vram.plugin.host_budget import HostBudget
    from pytest_vram.plugin.runner import Gate, Runner

    settings = _settings(config)
    runner = Runner(config, settings)
    config.pluginmanager.register(runner, RUNNER)
    config.pluginmanager.register(Gate(runner))
    config.pluginmanager.register(HostBudget(runner))  # after the runner, so that its wrappers are the outer ones
    if not hasattr(config, "workerinput") and not config.pluginmanager.has_plugin(COLLECTOR):
        config.pluginmanager.register(Collector(config, settings), COLLECTOR)
    return runner


def notice(config: pytest.Config) -> str | None:
    """Return the header's text on the dry GPU, or None if the plugin did not try to put one in place."""
    return config.stash.get(_NOTICE, None)


def _settings(config: pytest.Config) -> Settings:
    from pytest_vram.plugin import settings

    try:
        return settings.read(config)
    except VramUsageError as error:
        raise pytest.UsageError(str(error)) from error


def _go_dry(config: pytest.Config, choice: Choice, *, chosen: str) -> None:
    from pytest_vram.errors import DryGpuError
    from pytest_vram.probe import select

    try:
        select.go_dry(choice.card, choice.count, chosen=chosen)
    except DryGpuError as error:
        if chosen:
            raise pytest.UsageError(f"--vram-gpu=dry: {error}") from error
        config.stash[_NOTICE] = f"no GPU, and no dry GPU either ({error}); CPU tensors are traced"
    else:
        from pytest_vram.plugin import uncomputed

        config.pluginmanager.register(uncomputed.UncomputedReads(), uncomputed.NAME)
        how = "chosen" if chosen else "no GPU here; --vram-gpu chooses otherwise"
        cards = choice.card if choice.count in (None, 1) else f"{choice.card} x {choice.count}"
        config.stash[_NOTICE] = f"dry GPU {cards}: allocates as the card would, computes nothing ({how})"


def _require(config: pytest.Config, settings: Settings, kind: str) -> None:
    from pytest_vram.errors import ProbeUnavailable
    from pytest_vram.probe import select

    try:
        probe = config.hook.pytest_vram_probe(config=config) or select.choose(settings.gpu)
        found, why = probe.kind, ""
    except ProbeUnavailable as error:
        found, why = "none", f": {error}"
    if found != kind:
        raise pytest.UsageError(
            f"--vram-require={kind}: figures of this session would be of the kind {found!r}{why}. "
            f"Look at `{sys.executable} -m pytest_vram doctor`"
        )


def _mentioned(config: pytest.Config) -> bool:
    if options.asked_for(config):
        return True
    for count, path in enumerate(_test_files(config)):
        if count >= _MOST_FILES:
            return False
        try:
            if _USES.search(path.read_bytes()):
                return True
        except OSError:
            continue
    return False


def _test_files(config: pytest.Config) -> Iterator[Path]:
    here = Path(config.invocation_params.dir)
    arguments = list(config.known_args_namespace.file_or_dir or config.getini("testpaths") or [str(here)])
    for argument in arguments:
        path = here / argument.split("::")[0]
        if path.is_dir():
            for folder, folders, files in os.walk(path):
                folders[:] = [
                    f for f in folders if not f.startswith((".", "__")) and f not in ("node_modules", "venv", "build")
                ]
                yield from (Path(folder, name) for name in files if name.endswith(".py"))
        elif path.is_file():
            yield path
            conftest = path.parent / "conftest.py"
            if conftest.is_file():
                yield conftest
