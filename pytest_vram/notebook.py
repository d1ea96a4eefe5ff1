"""The magics of a notebook: ``%%vram`` measures a cell, and ``%vram_dry`` gives the kernel dry GPUs.

``%load_ext pytest_vram`` adds them to IPython, which is not a dependency: this module uses the shell that loads it.
"""

from __future__ import annotations

import argparse
import functools
import html
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pytest_vram.errors import DryGpuError, ProbeUnavailable, VramBudgetExceeded, VramError, VramUsageError
from pytest_vram.memory import Budget, Exceeded, Report, TestRecord
from pytest_vram.memory.code_names import add_namer
from pytest_vram.plugin.failure import memory_section
from pytest_vram.plugin.markers import limit_bytes
from pytest_vram.plugin.meter import Meter
from pytest_vram.plugin.verdicts import judge
from pytest_vram.probe.intervals import Intervals
from pytest_vram.probe.replay import HELD_BEFORE
from pytest_vram.probe.select import DEFAULT_CARD, Choice, choose
from pytest_vram.report import files
from pytest_vram.report.chart import curve
from pytest_vram.report.environment import environment
from pytest_vram.report.rows import worst
from pytest_vram.units import GIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_vram.memory import Measurement
    from pytest_vram.probe.protocol import Probe

RESULT = "_vram"
"""The notebook's variable that holds the :class:`CellMemory` of the last measured cell."""
_PICTURE_HEIGHT = 620  # pixels of the page below a cell; it scrolls


@dataclass(frozen=True, slots=True, kw_only=True)
class CellMemory:
    """The memory of one cell. A notebook shows it as a page, and a terminal as text.

    Attributes:
        name: what the notebook calls the cell.
        start_bytes: allocated bytes when the cell began, on the device where it needed most.
        peak_bytes: the allocated peak there; ``None`` where the device does not report one.
        kept_bytes: what is still allocated there after the cell beyond ``start_bytes``; negative if it freed more.
        report: all figures, as a report with one test.
    """

    name: str
    start_bytes: int
    peak_bytes: int | None
    kept_bytes: int
    report: Report

    def save(self, path: str | Path) -> None:
        """Write the report to a file, whose suffix says the format: .html, .json, .md or .csv.

        Raises:
            VramUsageError: there is no format for the suffix.
        """
        files.save(self.report, path)

    def __str__(self) -> str:
        measurement = _shown(self.report)
        if measurement is None:
            return f"{self.name}: no device was measured"
        added = None if self.peak_bytes is None else self.peak_bytes - self.start_bytes
        kept = (
            f"kept {format_bytes(self.kept_bytes)}"
            if self.kept_bytes >= 0
            else f"freed {format_bytes(-self.kept_bytes)}"
        )
        lines = [
            f"{self.name}: peak {format_bytes(self.peak_bytes)}, which is {format_bytes(added)} above the"
            f" {format_bytes(self.start_bytes)} that were held before; the cell {kept}",
            memory_section(measurement, measurement.holders[:_TOP]),
        ]
        if measurement.timeline is not None:
            lines += curve(measurement.timeline)
        if measurement.device.kind == "host":
            lines.append("CPU tensors count from the cell on that creates them under %%vram")
        if measurement.device.kind == "dry":
            unknown = sum(read.count for read in measurement.host_reads if not read.answered)
            read = f"; the cell read {unknown} values that were not computed, as zeros" if unknown else ""
            lines.append(f"a dry GPU computes nothing{read}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the page in a frame of its own, so that its style does not touch the notebook's."""
        summary = html.escape(str(self).partition("\n")[0])
        page = html.escape(files.to_html(self.report))
        return (
            f"<p>{summary}</p>"
            f'<iframe sandbox="allow-scripts" srcdoc="{page}" title="GPU memory of the cell"'
            f' style="width:100%;height:{_PICTURE_HEIGHT}px;border:1px solid #8884"></iframe>'
        )


_TOP = 10  # lines of code that the text names; the page has more


def load(shell: Any) -> None:
    """Add the magics to an IPython shell. A second call does nothing."""
    if "vram_dry" in shell.magics_manager.magics["line"]:
        return
    magics = _Magics(shell)
    shell.register_magic_function(_plainly(magics.measure), magic_kind="line_cell", magic_name="vram")
    shell.register_magic_function(_plainly(magics.dry), magic_kind="line", magic_name="vram_dry")
    add_namer(magics.cell_name)


class _Magics:
    """The magics of one shell, with the probe that all its cells are measured with."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._probe: Probe | None = None
        self._intervals: Intervals | None = None
        self._measured: dict[str, str] = {}  # the names of cells, by the file name that they were compiled under

    def measure(self, line: str, cell: str | None = None) -> None:
        """%%vram [--max-gb X] [--save FILE]: run the cell, and show its memory: the peak, who held it, and a picture.

        ``%vram STATEMENT`` does the same for one line. The figures are those of a GPU if the kernel has one, of a dry
        GPU after ``%vram_dry``, and otherwise of CPU tensors. The variable ``_vram`` keeps them.
        """
        options = _parsed(_cell_parser(), line if cell is not None else "")
        if cell is None and not line.strip():
            raise VramUsageError("%vram needs a statement to measure: %vram model(batch); %%vram measures a whole cell")
        budget = None
        if options.max_gb is not None:
            limit = limit_bytes("--max-gb", options.max_gb, unit=GIB)
            budget = Budget(limit_bytes=limit, origin="cli", where="%%vram --max-gb")
        shell = self._shell
        probe, intervals = self._device()
        probe.settle()
        meter = Meter(probe, intervals, budget, (), _TOP, timeline=True)
        try:
            # The first line of the cell is the magic's own: with it the numbers of lines are those of the notebook.
            code = line if cell is None else cell if cell.lstrip().startswith("%%") else f"#\n{cell}"
            compiled = shell.compile.get_code_name(code, shell.transform_cell(code), shell.execution_count)
            self._measured[compiled] = name = f"Cell In[{shell.displayhook.prompt_count}]"
            ran = shell.run_cell(code, store_history=False)
            error = ran.error_before_exec or ran.error_in_exec
            self._show(name, meter, budget, failed=error is not None, save=options.save)
        finally:
            intervals.end(meter.interval)
            probe.end_test()
        if error is not None:  # run_cell has shown it already
            raise _shown_as(error, [])

    def dry(self, line: str) -> None:
        """%vram_dry [CARD] [--count N]: give the kernel dry GPUs, which allocate as CARD does and compute nothing.

        It must run before torch is imported. ``python -m pytest_vram cards`` lists the cards.
        """
        from pytest_vram.drygpu import driver
        from pytest_vram.drygpu.process.activate import activate

        options = _parsed(_dry_parser(), line)
        if "torch" in sys.modules and not driver.is_active():
            raise DryGpuError(
                f"%vram_dry {options.card} comes too late, because this kernel has imported torch already: restart the"
                " kernel, and run %load_ext pytest_vram and %vram_dry before anything imports torch"
            )
        activate(options.card, count=options.count, replace_real_gpu=True)
        print(f"{options.count} x {options.card}, dry: it allocates as the card would, and computes nothing")

    def cell_name(self, filename: str) -> str | None:
        """Return what the notebook calls the cell that was compiled under ``filename``; ``None`` for other files."""
        found = self._shell.compile.format_code_name(filename)
        return None if found is None else self._measured.get(filename, " ".join(found))

    def _device(self) -> tuple[Probe, Intervals]:
        if self._probe is None or self._intervals is None:
            self._probe = choose(Choice(kind="auto"))
            if not self._probe.devices():
                self._probe = None
                raise ProbeUnavailable("no device is visible: look at CUDA_VISIBLE_DEVICES")
            self._intervals = Intervals(self._probe)
        return self._probe, self._intervals

    def _show(self, name: str, meter: Meter, budget: Budget | None, *, failed: bool, save: Path | None) -> None:
        """Display the cell's memory, keep it in the notebook, and hold it against the budget.

        Raises:
            VramBudgetExceeded: the cell needed more than ``--max-gb``.
        """
        measured = meter.measured()
        verdict = judge(budget, measured)
        record = TestRecord(
            nodeid=name,
            outcome="failed" if failed or isinstance(verdict, Exceeded) else "passed",
            budget=budget,
            measurements=tuple(map(_of_a_cell, meter.detailed(measured.measurements))),
            verdict=verdict,
        )
        report = Report(environment=environment([record]), tests=(record,))
        shown = _shown(report)
        now = meter.probe.allocated()
        index = shown.device.index if shown is not None else 0
        start = shown.start_bytes if shown is not None else 0
        memory = CellMemory(
            name=name,
            start_bytes=start,
            peak_bytes=shown.peak.allocated_bytes if shown is not None else None,
            kept_bytes=(now[index] if index < len(now) else 0) - start,
            report=report,
        )
        self._shell.user_ns[RESULT] = memory
        _display(memory)
        if save is not None:
            memory.save(save)
        if budget is not None and budget.limit_bytes is not None and isinstance(verdict, Exceeded) and not failed:
            limit, over = budget.limit_bytes, verdict.over_bytes
            raise VramBudgetExceeded(
                f"the cell needed {format_bytes(limit + over)}, {format_bytes(over)} more than --max-gb allows"
                f" ({format_bytes(limit)}); the lines above held it",
                limit_bytes=limit,
                peak_bytes=limit + over,
            )


def _of_a_cell(measurement: Measurement) -> Measurement:
    """Say in a measurement's holders that what was there before belongs to earlier cells."""
    return replace(
        measurement,
        holders=tuple(
            replace(holder, location="held before the cell") if holder.location == HELD_BEFORE else holder
            for holder in measurement.holders
        ),
    )


def _shown(report: Report) -> Measurement | None:
    """Return the measurement of the device on which the cell needed most."""
    return worst(report.tests[0])[1]


def _display(memory: CellMemory) -> None:
    from IPython.display import display

    display(memory)


def _shown_as(error: BaseException, lines: list[str]) -> BaseException:
    """Let IPython show these lines for an error, in place of its traceback."""
    error._render_traceback_ = lambda: lines  # type: ignore[attr-defined]  # IPython asks for it
    return error


def _plainly(magic: Callable[..., None]) -> Callable[..., None]:
    """Show this package's errors without the traceback, which is about this module and not about the cell."""

    @functools.wraps(magic)
    def run(*arguments: Any) -> None:
        try:
            magic(*arguments)
        except VramError as error:
            raise _shown_as(error, [f"{type(error).__name__}: {error}"]) from None

    return run


def _parsed(parser: argparse.ArgumentParser, line: str) -> argparse.Namespace:
    """Return the options in a magic's line.

    Raises:
        VramUsageError: the line cannot be read; the message shows the usage.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise VramUsageError(f"{parser.prog} {line}: {error}; {parser.format_usage().strip()}") from error
    return parser.parse_args(words)


class _Parser(argparse.ArgumentParser):
    """Raises where the base class would end the process, which is the notebook's kernel."""

    def error(self, message: str) -> NoReturn:
        raise VramUsageError(f"{self.prog}: {message}; {self.format_usage().strip()}")


def _cell_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="%%vram", add_help=False)
    parser.add_argument("--max-gb", type=float, metavar="X")
    parser.add_argument("--save", type=Path, metavar="FILE")
    return parser


def _dry_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="%vram_dry", add_help=False)
    parser.add_argument("card", nargs="?", default=DEFAULT_CARD, metavar="CARD")
    parser.add_argument("--count", type=int, default=1, metavar="N")
    return parser
