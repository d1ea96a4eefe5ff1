"""Projects for the plugin to run in, each in a process of its own, on a device that is made up.

The made-up device allocates exactly what a test says, so that budgets can be met to the byte, and needs no torch: a
run costs half a second. What the real probes read is tested where they run.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from pytest_vram.drygpu.stub.library import cache_folder

# Where the dry GPU is compiled once. `pytester` gives each test a home of its own, where it would be compiled anew.
COMPILED = cache_folder()
DEVICE = (Path(__file__).parent / "made_up_device.py").read_text()

MAKES_PROBE = """
import made_up_device

def pytest_vram_probe(config):
    return made_up_device.PROBE
"""


class Project:
    """A folder with test files, and pytest over it."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        pytester.makepyfile(made_up_device=DEVICE)
        pytester.makeconftest(MAKES_PROBE)

    def write(self, source: str, name: str = "test_it") -> None:
        prelude = "import pytest\nfrom made_up_device import alloc, free, MB\nfrom pytest_vram import *\n"
        self.pytester.makepyfile(**{name: prelude + textwrap.dedent(source)})

    def conftest(self, source: str) -> None:
        self.pytester.makeconftest(MAKES_PROBE + textwrap.dedent(source))

    def ini(self, *lines: str) -> None:
        self.pytester.makeini("\n".join(["[pytest]", *lines]))

    def run(self, *arguments: str, plugins: tuple[str, ...] = ()) -> pytest.RunResult:
        """Run pytest with this plugin and those named: loading all that are installed takes longer than the tests."""
        chosen = [part for name in ("vram", *plugins) for part in ("-p", name)]
        return self.pytester.runpytest_subprocess("-p", "no:cacheprovider", *chosen, *arguments)

    def report(self, *arguments: str, plugins: tuple[str, ...] = ()) -> dict[str, Any]:
        """Run, and return the JSON report's tests by their name without the file."""
        self.run("--vram-output=report.json", *arguments, plugins=plugins)
        data = json.loads((self.pytester.path / "report.json").read_text())
        return {test["nodeid"].partition("::")[2]: test for test in data["tests"]}


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_VRAM_CACHE", str(COMPILED))
    return Project(pytester)
