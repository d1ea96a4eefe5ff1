"""Gathers the records of all processes into one report, prints it and writes it, in the process that gets reports."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram.errors import VramError
from pytest_vram.memory import Report, TestRecord
from pytest_vram.plugin import records
from pytest_vram.plugin.history import HistoryWriter

if TYPE_CHECKING:
    from pytest_vram.baseline import Peaks
    from pytest_vram.plugin.settings import Settings


class Collector:
    """Collects the records of a session; a session has one collector, in its only process or in xdist's controller."""

    def __init__(self, config: pytest.Config, settings: Settings) -> None:
        self.config, self.settings = config, settings
        self.records: dict[str, TestRecord] = {}
        self._problems: list[str] = []
        self._peaks = _read_baseline(settings)
        self._written: list[str] = []
        self._history = None if settings.history is None else HistoryWriter(settings.history, config.rootpath)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a test's record from the report of its teardown.

        A record with memory over time is replaced in the report by a shorter one, for JUnit and other readers.
        """
        for position, (name, text) in enumerate(report.user_properties):
            if name == records.PROPERTY:
                record = records.read(text)
                outcome = "failed" if report.failed else record.outcome
                self.records[report.nodeid] = replace(record, outcome=outcome)
                if any(m.timeline for m in record.measurements):
                    short = tuple(replace(m, timeline=None, holders=m.holders[:5]) for m in record.measurements)
                    report.user_properties[position] = (name, records.written(replace(record, measurements=short)))

    def report(self) -> Report:
        """Return all measurements in the order in which the tests ran, compared with the baseline if there is one."""
        from pytest_vram import baseline
        from pytest_vram.report.environment import environment

        tests, settings = tuple(self.records.values()), self.settings
        report = Report(environment=environment(tests), tests=tests)
        if settings.baseline is None or settings.update_baseline:
            return report
        return baseline.held_against(
            report, self._peaks, source=settings.baseline.name, tolerance=settings.tolerance_percent
        )

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Write the report files, the baseline and the history."""
        from pytest_vram import baseline
        from pytest_vram.report import files

        report = self.report()
        try:
            for path in self.settings.output:
                files.save(report, path)
                self._written.append(f"report written to {path}")
            if self.settings.update_baseline and self.settings.baseline is not None:
                changed = baseline.update(self.settings.baseline, report)
                self._written.append(f"{changed} entries of {self.settings.baseline} written")
            if self._history is not None:
                self._written += self._history.write(report)
        except (OSError, VramError) as error:
            self._problems.append(f"{error}")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the table, the tests that were not measured, and the files that were written."""
        from pytest_vram.plugin import session_end

        notes = [*self._written, *self._problems]
        session_end.write(terminalreporter, self.report(), self.settings, self._peaks, notes)


def _read_baseline(settings: Settings) -> Peaks:
    """Return the baseline's peaks; an unreadable baseline is reported before the first test, not after the last."""
    from pytest_vram import baseline

    if settings.baseline is None or settings.update_baseline:
        return {}
    try:
        return baseline.read(settings.baseline)
    except VramError as error:
        raise pytest.UsageError(str(error)) from error
