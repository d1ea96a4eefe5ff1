"""Runs one rank of a test with ``vram_ranks``: a separate pytest process, which runs that test and reports on it."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from _pytest.config import Config  # the constructor that xdist's workers use as well

from pytest_vram.memory import Process
from pytest_vram.plugin.rank_messages import RankRequest, RankResult
from pytest_vram.probe import reporter

if TYPE_CHECKING:
    from pytest_vram.memory import TestRecord


class RankChild:
    """Sets up and destroys the process group, and reports the result to the process that started the ranks."""

    def __init__(self, request: RankRequest) -> None:
        self._request = request
        self._rank = int(os.environ["RANK"])
        self._result: RankResult | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Set up the process group before the first fixture, because fixtures may need it."""
        import torch
        import torch.distributed as dist

        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(self._rank % torch.cuda.device_count())
        backend = self._request.backend or ("cpu:gloo,cuda:nccl" if gpu else "gloo")
        if not dist.is_initialized():
            dist.init_process_group(backend, timeout=timedelta(seconds=self._request.timeout))

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self) -> None:
        """Destroy the process group after the last fixture is torn down."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the first failure or, if nothing failed, whether the test passed or was skipped."""
        if report.failed or report.when == "call" or (report.when == "setup" and report.skipped):
            if self._result is not None and self._result.outcome == "failed":
                return
            text = report.longreprtext
            if report.skipped and isinstance(report.longrepr, tuple):
                text = report.longrepr[2].removeprefix("Skipped: ")
            sections = "".join(f"\n--- {title} ---\n{content.rstrip()}" for title, content in report.sections)
            text += sections if report.failed else ""
            self._result = RankResult(
                outcome=report.outcome,
                when=report.when,
                text=text.encode(errors="backslashreplace").decode(),  # xdist cannot send lone surrogates
                time=time.monotonic(),
            )
            if report.failed:
                self._result.leave(self._request.folder, self._rank)

    def pytest_vram_record(self, record: TestRecord) -> None:
        """Write this rank's figures to a file, for the test's budget."""
        if self._request.figures is None:
            return
        pid = os.getpid()
        process = Process(
            pid=pid,
            name=reporter.command(pid),
            began=reporter.started(pid) or reporter.now(),
            ended=reporter.now(),
            rank=self._rank,
            measurements=tuple(m for m in record.measurements if reporter.used(m)),
        )
        reporter.write_figures(self._request.figures, process)

    def pytest_sessionfinish(self) -> None:
        """Write the result for the process that started the ranks."""
        result = self._result or RankResult(
            outcome="failed",
            when="collection",
            text="the test was not found by this rank: it must be collected under the same name in every process",
            time=time.monotonic(),
        )
        result.leave(self._request.folder, self._rank)


def main(path: str) -> int:
    """Run the test that the request in the file names, and return pytest's exit code."""
    request: RankRequest = pickle.loads(Path(path).read_bytes())
    # A rank that is terminated because it is late writes where its main thread is.
    place = (request.folder / f"{os.environ['RANK']}.where").open("w")
    faulthandler.register(signal.SIGTERM, file=place, all_threads=False, chain=True)
    if request.figures is not None:
        reporter.own(str(request.figures), None)  # the test's figures are written, not those of the whole process
    config = Config.fromdictargs(dict(request.options), [request.test])
    config.pluginmanager.register(RankChild(request), "vram-rank-child")
    return int(config.hook.pytest_cmdline_main(config=config))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
