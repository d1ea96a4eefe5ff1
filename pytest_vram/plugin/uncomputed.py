"""Reports tests that read values from a GPU that computes none, in the failing test and by name at the end."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram.plugin import markers

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_vram.memory import HostRead

NAME = "vram-uncomputed"
_READS = "vram_zeros_read"  # an attribute of a report, so that xdist passes it to the controller
_SHOWN = 5
_REMEDY = "keep it off the dry GPU with @pytest.mark.vram_values (skipped there), or run with --vram-gpu=host"


class UncomputedReads:
    """A plugin that is registered while the dry GPU is in place.

    For a test that reads nothing back, it costs one look at a short list.
    """

    def __init__(self) -> None:
        self._before: tuple[HostRead, ...] = ()
        self._unmarked: dict[str, str] = {}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        """Note the reads so far, to distinguish this test's reads from them."""
        self._before = _reads()
        return (yield)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
        """Add the zeros that a test read to the report of its failure, because its assertions may have compared them.

        The report of a test that does not use this plugin is marked as well.
        """
        report: pytest.TestReport = yield
        zeros = _unanswered(self._before) if call.when == "call" else ()
        if not zeros:
            return report
        if not markers.concern(item):
            setattr(report, _READS, zeros[0].location)
        if report.failed:
            report.sections.append(("dry GPU", _section(zeros)))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the names of tests that do not use this plugin, because they may not know that the GPU is dry."""
        where = getattr(report, _READS, None)
        if where is not None:
            self._unmarked[report.nodeid] = where

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print these tests' names, also those that passed, because a loss of zero is below every limit."""
        if not self._unmarked:
            return
        count = len(self._unmarked)
        terminalreporter.write_line(
            f"vram: {count} test{'s' * (count > 1)} without a budget read values that the dry GPU does not compute, and"
            f" got zeros; {_REMEDY}:",
            yellow=True,
        )
        for nodeid, where in list(self._unmarked.items())[:_SHOWN]:
            terminalreporter.write_line(f"  {nodeid}  (at {where})")
        if count > _SHOWN:
            terminalreporter.write_line(f"  and {count - _SHOWN} more")


def _reads() -> tuple[HostRead, ...]:
    """Return all that the process has read so far; reads are listed only once torch is imported."""
    module = sys.modules.get("pytest_vram.drygpu.values.host_reads")
    reads: tuple[HostRead, ...] = module.collect() if module is not None else ()
    return reads


def _unanswered(before: tuple[HostRead, ...]) -> tuple[HostRead, ...]:
    module = sys.modules.get("pytest_vram.drygpu.values.host_reads")
    return tuple(read for read in module.since(before) if not read.answered) if module is not None else ()


def _section(zeros: tuple[HostRead, ...]) -> str:
    lines = ["The test read values that a dry GPU does not compute, and got zeros:"]
    lines += [f"  {read.location}  ({read.operation})" for read in zeros[:_SHOWN]]
    if len(zeros) > _SHOWN:
        lines.append(f"  and at {len(zeros) - _SHOWN} more lines")
    return "\n".join([*lines, f"If they decide the test, {_REMEDY}."])
