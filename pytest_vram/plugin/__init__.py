"""The pytest plugin: the only importer of pytest.

pytest loads this module in every session of an environment that has the package, so it imports nothing heavy: the
first test that needs torch, pynvml or the rest of the plugin brings them in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_vram.plugin.fixtures import Gpu, Vram
    from pytest_vram.plugin.runner import Runner

_RUNNER = "vram-runner"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the options and ini settings."""
    from pytest_vram.plugin.options import add_options

    add_options(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Register this plugin's own hooks."""
    from pytest_vram.plugin import hookspecs

    pluginmanager.add_hookspecs(hookspecs)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Put the dry GPU in place before any conftest can import torch."""
    from pytest_vram.plugin import activation

    activation.before_conftests(early_config)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the markers and, if a setting asks for measurements, the rest of the plugin."""
    from pytest_vram.plugin import activation, options

    config.addinivalue_line("markers", options.MARK_HELP)
    config.addinivalue_line("markers", options.VALUES_HELP)
    config.addinivalue_line("markers", options.RANKS_HELP)
    activation.configure(config)


def pytest_report_header(config: pytest.Config) -> str | None:
    """Return a line that says that the GPU is dry, because every test of the session sees that GPU."""
    from pytest_vram.plugin import activation

    text = activation.notice(config)
    return None if text is None else f"vram: {text}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Register the rest of the plugin if a collected test concerns it."""
    if not config.pluginmanager.has_plugin(_RUNNER) and _concerned(items):
        from pytest_vram.plugin import activation

        activation.start(config).pytest_collection_modifyitems(items)


def _concerned(items: list[pytest.Item]) -> bool:
    """Return whether any test has one of this plugin's marks or fixtures.

    This runs in every session, so it looks at the marks of each class and module only once.
    """
    marked: dict[object, bool] = {}
    for item in items:
        names = getattr(item, "fixturenames", ())
        if "vram" in names or "gpu" in names or any(mark.name.startswith("vram") for mark in item.own_markers):
            return True
        parent = item.parent
        if parent is not None and parent not in marked:
            marked[parent] = any(mark.name.startswith("vram") for mark in parent.iter_markers())
            if marked[parent]:
                return True
    return False


@pytest.fixture(scope="session")
def gpu(request: pytest.FixtureRequest) -> Gpu:
    """The device to test on: ``gpu.device``, ``gpu.kind``, ``gpu.name``, ``gpu.total_bytes``, ``gpu.computes``."""
    return _runner(request).gpu(request)


@pytest.fixture
def vram(request: pytest.FixtureRequest) -> Vram:
    """Measures phases of the test: ``with vram.measure("forward"): ...``, then ``vram["forward"].allocated``."""
    return _runner(request).vram(request)


def _runner(request: pytest.FixtureRequest) -> Runner:
    runner: Runner | None = request.config.pluginmanager.get_plugin(_RUNNER)
    if runner is None:
        from pytest_vram.plugin import activation

        runner = activation.start(request.config)
    return runner
