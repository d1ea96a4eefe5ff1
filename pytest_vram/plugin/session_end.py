"""Writes what the terminal shows at the end of a session."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from pytest_vram.memory import Unmeasured
from pytest_vram.plugin.ranks import left_text
from pytest_vram.units import GIB, MIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_vram.baseline import Peaks
    from pytest_vram.memory import Report, TestRecord
    from pytest_vram.plugin.settings import Settings

_MARGIN = 1.05
_NAMED = 5
_SLACK = 1.5  # a budget this many times the peak would let the test grow by half unnoticed


def write(terminal: Any, report: Report, settings: Settings, peaks: Peaks, notes: Sequence[str]) -> None:
    """Write the sections that have something to report.

    Args:
        terminal: pytest's terminal reporter.
        report: what was measured.
        settings: the session's settings.
        peaks: the baseline's peaks, if the session is compared with one.
        notes: notes on the files that were written, and on those that could not be.
    """
    if settings.report and report.tests:
        from pytest_vram.report.terminal import render

        terminal.section("GPU memory", sep="=")
        width = terminal._tw.fullwidth
        text = render(
            report,
            width=width,
            color=terminal._tw.hasmarkup,
            verbosity=terminal.config.get_verbosity(),
            top=settings.top,
        )
        terminal.write_line(text)
    _write_unmeasured(terminal, report)
    _write_unmeasured_host(terminal, report)
    _write_left(terminal, report)
    if settings.baseline is not None and not settings.update_baseline:
        _write_baseline(terminal, report, settings, peaks)
    if settings.suggest:
        _write_suggestions(terminal, report)
    for note in notes:
        terminal.write_line(f"vram: {note}")


def suggestion(record: TestRecord) -> str | None:
    """Return a marker for a passed test that has none, or one far above its peak; None for any other test.

    The suggested budget is the peak plus 5%, rounded up.
    """
    peaks = [peak for m in record.measurements if (peak := m.figure("allocated"))]
    if not peaks or record.outcome != "passed":
        return None
    budget = record.budget
    limit = budget.limit_bytes if budget is not None and budget.origin == "marker" else None
    if limit is not None and (record.verdict is None or limit <= max(peaks) * _SLACK or _other_metric(record)):
        return None
    wanted = max(peaks) * _MARGIN
    if wanted >= GIB:
        return f"@pytest.mark.vram(max_gb={math.ceil(wanted / GIB * 10) / 10:g})"
    return f"@pytest.mark.vram(max_mb={max(1, math.ceil(wanted / MIB))})"


def _other_metric(record: TestRecord) -> bool:
    return record.budget is not None and record.budget.metric != "allocated"


def _write_unmeasured(terminal: Any, report: Report) -> None:
    """Write which budgets were not measured; always, because such a budget must not look like one that was kept."""
    reasons = Counter(t.verdict.reason for t in report.tests if isinstance(t.verdict, Unmeasured))
    for reason, count in reasons.items():
        noun = "budget was" if count == 1 else "budgets were"
        terminal.write_line(f"vram: {count} {noun} not measured: {reason}", yellow=True)
        names = [t.nodeid for t in report.tests if isinstance(t.verdict, Unmeasured) and t.verdict.reason == reason]
        for name in names[:5]:
            terminal.write_line(f"  {name}")
        if len(names) > 5:
            terminal.write_line(f"  and {len(names) - 5} more")


def _write_unmeasured_host(terminal: Any, report: Report) -> None:
    """Write which budgets of host memory were not measured; always, as for the device's memory."""
    for reason, count in Counter(t.host.missing for t in report.tests if t.host is not None and t.host.missing).items():
        noun = "budget of host memory was" if count == 1 else "budgets of host memory were"
        terminal.write_line(f"vram: {count} {noun} not measured: {reason}", yellow=True)


def _write_left(terminal: Any, report: Report) -> None:
    """Write which processes tests left running; always, because they take memory from the tests after them."""
    left = [(test.nodeid, process) for test in report.tests for process in test.processes if process.left]
    for nodeid, process in left[:_NAMED]:
        terminal.write_line(f"vram: {nodeid} left a process running: {left_text(process)}", yellow=True)
    if len(left) > _NAMED:
        terminal.write_line(f"vram: and {len(left) - _NAMED} more processes were left running", yellow=True)


def _write_baseline(terminal: Any, report: Report, settings: Settings, peaks: Peaks) -> None:
    from pytest_vram import baseline

    assert settings.baseline is not None
    changes = baseline.compare(report, peaks, settings.tolerance_percent)
    for change in changes.improved:
        terminal.write_line(f"vram: {change.message(settings.baseline)}", green=True)
    if changes.missing:
        terminal.write_line(
            f"vram: {len(changes.missing)} tests have no entry in {settings.baseline} (--vram-update-baseline adds"
            " them):"
        )
        for nodeid in changes.missing[:5]:
            terminal.write_line(f"  {nodeid}")


def _write_suggestions(terminal: Any, report: Report) -> None:
    terminal.section("suggested budgets (peak + 5%)", sep="-")
    found = [(record, text) for record in report.tests if (text := suggestion(record))]
    for record, text in found:
        peak = max(m.figure("allocated") or 0 for m in record.measurements)
        kind = record.measurements[0].device.kind
        terminal.write_line(f"{text:<36} # {record.nodeid}: peak {format_bytes(peak)} ({kind})")
    if not found:
        terminal.write_line("nothing to suggest: every measured test has a budget that fits it")
