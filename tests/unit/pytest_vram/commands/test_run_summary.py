"""A dry run's figures, put together from its processes and written for a terminal."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from pytest_vram.commands.run_page import as_report
from pytest_vram.commands.run_processes import RunProcess
from pytest_vram.commands.run_summary import RunReport, combine
from pytest_vram.commands.run_text import render
from pytest_vram.drygpu.cards import IDLE_CONTEXT, context_source, find_card
from pytest_vram.memory import HostRead, Note, Work
from pytest_vram.memory.run_record import CardRecord, RunRecord
from pytest_vram.memory.spread import MEASURED
from pytest_vram.report import files
from pytest_vram.units import GIB, MIB

CARD = find_card("l4")
ITEM = HostRead(location="train.py:7", operation="item", count=3, answered=False, note="read as zero")
PLANS = Note(
    name="cuDNN execution plans that were timed (cudnn.benchmark)",
    text="their workspace is counted as 0 bytes",
    source="driver",
)
POOL = Note(name="cudaMallocAsync", text="a guess", source="driver")


def process(
    index: int = 0, allocated: int = GIB, *, ooms: int = 0, managed: int = 0, nccl: int = 0, **more: Any
) -> RunProcess:
    """A process that used one card from second 1 to second 2, and ended well."""
    device = CardRecord(
        index=index,
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=allocated + 2 * MIB,
        peak_device_bytes=allocated + 302 * MIB,
        context_bytes=300 * MIB,
        nccl_bytes=nccl,
        managed_bytes=managed,
        total_bytes=CARD.total_bytes,
        num_alloc_retries=2 * ooms,
        num_ooms=ooms,
        work=Work(launches=1200, copies_to_host=1, copied_to_host_bytes=4, synchronizations=2),
    )
    usual = {"pid": 4711, "used_seconds": 1.0, "ended_seconds": 2.0, "exit_code": 0, "devices": (device,)}
    return RunProcess(**(usual | more))


def report(*processes: RunProcess, code: int = 0, **more: Any) -> RunReport:
    """``more`` is what the first process left beside its figures."""
    usual: dict[str, Any] = {"parent": 1, "argv": (), "started_ns": 0, "versions": {"torch": "2"}}
    records = [RunRecord(pid=p.pid, **usual, **(more if i == 0 else {})) for i, p in enumerate(processes)]
    return combine(processes, records, card=CARD, count=1, total_bytes=None, code=code, seconds=1.25, conf=None)


def test_one_process() -> None:
    found = report(process())
    assert (found.fits, found.outcome, found.exact) == (True, "fits", True)
    assert found.as_json()["peak_device_bytes"] == GIB + 302 * MIB
    assert render(found).splitlines()[1:] == [
        "=== dry run on 1 x NVIDIA L4: allocator-exact; nothing was computed ===",
        "peak allocated     1.00 GiB",
        "peak reserved      1.00 GiB",
        "peak on device     1.29 GiB (with 300 MiB of CUDA context): fits 22.0 GiB with 20.7 GiB to spare",
        f"context            {IDLE_CONTEXT}",
        "kernels launched   1,200",
        "copied to device   0 B in 0 copies",
        "copied to host     4 B in 1 copy",
        "waits for device   2 times",
        "ended with         exit code 0 after 1.2 s",
    ]


def test_only_a_context_that_was_not_measured_is_called_approximate() -> None:
    record = RunRecord(pid=4711, parent=1, argv=(), started_ns=0)
    h200 = find_card("h200")
    found = combine([process()], [record], card=h200, count=1, total_bytes=None, code=0, seconds=1, conf=None)
    assert IDLE_CONTEXT not in render(found)
    assert found.as_json()["context_source"] == context_source(h200)
    assert found.as_json()["context_caveat"] is None
    assert IDLE_CONTEXT not in files.to_html(as_report(found, ["train.py"]))
    found = report(process())
    assert found.as_json()["context_source"] == context_source(CARD)
    assert found.as_json()["context_caveat"] == IDLE_CONTEXT
    for suffix in (".md", ".html", ".json"):
        assert IDLE_CONTEXT in files._FORMATS[suffix](as_report(found, ["train.py"]))
    assert (found.exact, found.likely) == (True, False), "it is no assumption of the allocator's figures"


def test_a_verdict_is_only_likely_where_measured_runs_were_as_far_off() -> None:
    """The context of 300 MiB and no more is left out of what the assumption may change."""
    found = report(process(allocated=12 * GIB), notes=[PLANS])
    total, reserved = CARD.total_bytes, 12 * GIB + 2 * MIB
    assert (found.fits, found.likely) == (True, True)
    spread = {
        "low": reserved + 300 * MIB,
        "expected": reserved + 300 * MIB,
        "high": math.ceil(reserved * 1.85) + 300 * MIB,
        "basis": MEASURED,
    }
    assert found.as_json()["devices"][0]["peak_device_spread"] == spread
    assert found.as_json()["likely"] is True
    assert "likely fits 22.0 GiB" in render(found)
    assert f"likely             between 12.3 GiB and 22.5 GiB, {MEASURED}" in render(found)

    small = report(process(), notes=[PLANS])
    assert (small.fits, small.likely) == (True, False)
    assert ": fits 22.0 GiB" in render(small)

    over = process(allocated=total - 200 * MIB)
    assert "LIKELY DOES NOT FIT" in render(report(over, notes=[POOL]))
    assert ": DOES NOT FIT" in render(report(over, notes=[PLANS])), "which can only be more"

    certain = report(process())
    assert certain.likely is False
    assert certain.as_json()["devices"][0]["peak_device_spread"] is None


def test_nccls_buffers_are_told_apart() -> None:
    found = report(process(nccl=24 * MIB))
    assert found.as_json()["devices"][0]["nccl_bytes"] == 24 * MIB
    assert "(with 300 MiB of CUDA context and 24.0 MiB of NCCL's buffers)" in render(found)
    assert "NCCL" not in render(report(process()))


def test_processes_that_live_at_once_on_one_card_are_added_up_and_it_is_said() -> None:
    found = report(process(allocated=12 * GIB), process(allocated=12 * GIB, used_seconds=1.5, pid=4712))
    (device,) = found.devices
    assert (device.processes, device.at_once) == (2, 2)
    assert device.peak_allocated_bytes == 24 * GIB
    assert (found.fits, found.exact) == (False, False)
    text = render(found)
    assert "DOES NOT FIT 22.0 GiB: 2.56 GiB too much" in text
    assert "GPU 0, 2 processes: an upper bound: the peaks of processes that lived at the same time are added" in text
    assert "allocator-exact" not in text
    assert "process 4712, from 1.5 s to 2.0 s: 12.3 GiB on GPU 0; exit code 0" in text


def test_processes_that_run_one_after_another_are_not_added_up() -> None:
    lives = [process(allocated=size * GIB, used_seconds=2.0 * size, ended_seconds=2.0 * size + 1) for size in (12, 13)]
    found = report(*lives)
    (device,) = found.devices
    assert (device.processes, device.at_once, device.peak_allocated_bytes) == (2, 1, 13 * GIB)
    assert (found.fits, found.exact) == (True, True)
    assert "2 processes, one after another: the largest counts" in render(found)


def test_cards_are_kept_apart_and_the_worst_is_at_the_top() -> None:
    found = report(process(0, GIB), process(1, 3 * GIB))
    assert [device.peak_allocated_bytes for device in found.devices] == [GIB, 3 * GIB]
    assert found.as_json()["peak_allocated_bytes"] == 3 * GIB
    assert "GPU 0" in render(found)


def test_out_of_memory_that_nothing_catches_does_not_fit_however_little_was_held() -> None:
    message = "CUDA out of memory. Tried"
    found = report(process(ooms=1, out_of_memory=message, exit_code=1, raised="OutOfMemoryError: CUDA"), code=1)
    assert found.fits is False
    text = render(found)
    assert "DID NOT FIT: 1 out-of-memory error\n" in text
    assert f"OUT OF MEMORY: {message}" in text
    assert as_report(found, ["train.py"]).tests[0].outcome == "failed"


@pytest.mark.parametrize(
    ("more", "code", "fits"),
    [
        ({}, 0, True),  # caught, and the program went on with less
        ({"exit_code": 1}, 1, False),  # caught, told in other words, and given up
        ({"exit_code": 1}, 0, False),  # a child that gave up, in a program that did not notice
        ({"raised": "RuntimeError: no batch fits"}, 0, False),
    ],
)
def test_caught_out_of_memory_errors_count_by_how_the_program_ended(
    more: dict[str, Any], code: int, fits: bool
) -> None:
    found = report(process(ooms=7, **more), code=code)
    assert found.fits is fits
    assert found.as_json()["num_ooms"] == 7
    said = "fits 22.0 GiB after 7 out-of-memory errors: the card was full then, and the program went on with less"
    assert (said if fits else "DID NOT FIT: 7 out-of-memory errors") in render(found)
    (test,) = as_report(found, ["train.py"]).tests
    assert (test.outcome == "passed") is fits


def test_a_figure_above_the_card_does_not_fit_though_the_program_ended_well() -> None:
    found = report(process(allocated=23 * GIB))
    assert (found.fits, found.outcome) == (False, "does not fit")


def test_the_work_of_all_processes_of_a_card_is_added() -> None:
    found = report(process(), process(), process(1))
    first, second = found.devices
    assert first.work == second.work + second.work
    assert (second.work.launches, second.work.synchronizations) == (1200, 2)
    assert found.as_json()["launches"] == 2400
    text = render(found)
    for line in ("kernels launched   2,400", "copied to host     8 B in 2 copies", "waits for device   4 times"):
        assert line in text
    assert as_report(found, ["train.py"]).tests[0].measurements[0].work == first.work
    assert report().as_json()["launches"] is None


def test_nothing_on_the_gpu_is_no_verdict() -> None:
    found = report()
    assert (found.fits, found.outcome) == (None, "no GPU used")
    assert found.as_json()["peak_allocated_bytes"] is None
    assert "no process used the GPU" in render(found)


@pytest.mark.parametrize(("code", "exit_code", "number"), [(3, 3, None), (-9, 137, 9), (-2, 130, 2)])
def test_signals_become_the_shells_exit_codes_and_a_cut_short_program_does_not_fit(
    code: int, exit_code: int, number: int | None
) -> None:
    found = report(process(), code=code)
    assert (found.exit_code, found.signal) == (exit_code, number)
    assert (found.fits, found.outcome) == (None, "unknown")
    ended = f"signal {number}" if number else "exit code 3"
    assert f"UNKNOWN whether it fits: the program ended with {ended}" in render(found)


def test_a_program_whose_processes_are_killed_before_they_use_a_gpu_says_so() -> None:
    early = ["process 7 was killed by signal 9 (SIGKILL)"]
    usual: dict[str, Any] = {"card": CARD, "count": 1, "total_bytes": None, "seconds": 1, "conf": None}
    found = combine([], [], **usual, code=1, killed_early=early)
    assert (found.outcome, found.fits) == ("unknown", None)
    assert f"UNKNOWN whether it fits: {early[0]}; the program ended with exit code 1" in render(found)
    assert combine([], [], **usual, code=0, killed_early=early).outcome == "no GPU used", "it did without them"


RANKS = [process(rank, pid=100 + rank, rank=rank, local_rank=rank, local_world_size=2, group="g") for rank in (0, 1)]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (
            {"exit_code": 1, "raised": "EOFError: Ran out of input"},
            "ended with exit code 1 (EOFError: Ran out of input)",
        ),
        ({"raised": "EOFError"}, "raised EOFError"),
        ({"devices": None, "ended_seconds": None, "exit_code": None}, "ended without leaving its figures"),
        ({"devices": None, "ended_seconds": None, "exit_code": None, "running": True}, "still ran when"),
    ],
)
def test_a_job_with_a_failed_rank_never_fits(second: dict[str, Any], said: str) -> None:
    """Its launcher may end with exit code 0 all the same."""
    found = report(RANKS[0], replace(RANKS[1], **second))
    assert (found.fits, found.outcome, found.exact, found.lost_a_rank) == (None, "unknown", False, True)
    assert not report(*RANKS).lost_a_rank
    assert f"UNKNOWN whether it fits: rank 1 (PID 101) {said}" in render(found)
    assert any(f"rank 1 (PID 101) {said}" in fault for fault in found.as_json()["faults"])
    (test,) = as_report(found, ["train.py"]).tests
    assert test.outcome == "failed"
    for suffix in (".md", ".html", ".json"):
        assert said in files._FORMATS[suffix](as_report(found, ["train.py"]))


def test_a_rank_that_never_came_is_missed() -> None:
    found = report(RANKS[0])
    assert found.outcome == "unknown"
    assert "local rank 1 never imported torch" in render(found)


def test_every_card_is_shown_with_its_rank_and_process() -> None:
    found = report(*RANKS)
    assert found.fits is True
    assert [(p["rank"], p["pid"], p["devices"][0]["index"]) for p in found.as_json()["processes"]] == [
        (0, 100, 0),
        (1, 101, 1),
    ]
    page = as_report(found, ["train.py"])
    shown = [(m.device.index, p.rank, p.pid) for m in page.tests[0].measurements for p in m.processes]
    assert shown == [(0, 0, 100), (1, 1, 101)]
    assert "<td>1</td>" in files.to_html(page).replace(' class="n"', "").replace(' data-head="rank"', "")


def test_reads_of_one_line_are_added_up_and_guesses_come_first() -> None:
    spread = replace(ITEM, answered=True, note="indices taken as spread evenly")
    known = replace(ITEM, answered=True, note="", count=5)
    found = report(process(), host_reads=[ITEM, known, spread, ITEM])
    assert [(read.count, read.answered) for read in found.host_reads] == [(6, False), (5, True), (3, True)]
    assert found.exact is False
    text = render(found)
    assert "host reads         5 answered with the program's own values; the figures rest on these guesses:" in text
    assert "       6 x item, train.py:7: read as zero" in text
    assert "       3 x item, train.py:7: indices taken as spread evenly" in text


def test_many_guesses_are_cut_short() -> None:
    reads = [replace(ITEM, location=f"train.py:{line}") for line in range(20)]
    assert "  and 8 more places (--json lists all)" in render(report(process(), host_reads=reads))


def test_what_is_missing_or_assumed_is_said_and_nothing_is_called_exact_then() -> None:
    lost = replace(PLANS, name="memory history", text="it was stopped", figures=False)
    found = report(process(managed=GIB, ooms=1), missing_functions=["cudnnFoo"], notes=[PLANS, lost])
    text = render(found)
    assert "CUDA functions that the dry GPU has not got: cudnnFoo" in text
    assert f"assumptions:\n  {PLANS.name}: their workspace is counted as 0 bytes\n" in text
    assert "  memory history: it was stopped" in text
    assert "allocator-exact" not in text
    assert "managed (paged)    1.00 GiB, not counted above" in text
    assert "cache flushes      2 (before an allocation was satisfied or refused)" in text
    assert [note["name"] for note in found.as_json()["notes"]] == [PLANS.name, "memory history"]
    assert found.as_json()["exact"] is False
    assert report(process(), notes=[lost]).exact is True, "the peaks do not rest on it"


def test_likely_is_said_of_the_verdict_and_not_of_a_card_that_does_not_decide_it() -> None:
    near, surely = process(0, 12 * GIB), process(1, 23 * GIB)
    found = report(near, surely, notes=[PLANS])
    assert (found.fits, found.likely) == (False, False), "the second card is too full by all bounds"
    assert "LIKELY DOES NOT FIT" not in render(found)
    assert report(near, process(1), notes=[PLANS]).likely is True

    over = process(1, CARD.total_bytes - 200 * MIB)
    assert (report(process(), over, notes=[POOL]).fits, report(process(), over, notes=[POOL]).likely) == (False, True)
    assert report(surely, over, notes=[POOL]).likely is False

    failed = report(process(allocated=12 * GIB, raised="EOFError"), notes=[PLANS])
    assert (failed.fits, failed.likely) == (None, False)
    refused = process(allocated=12 * GIB, ooms=1, out_of_memory="CUDA out of memory", exit_code=1)
    assert (report(refused, code=1, notes=[PLANS]).fits, report(refused, code=1, notes=[PLANS]).likely) == (
        False,
        False,
    )


def test_each_process_that_runs_at_once_may_be_off_by_as_much() -> None:
    note = Note(name="cuFFT (_fft_r2c)", text="a guess", source="operators", size_bytes=GIB)
    one, two = (report(*[process(allocated=GIB)] * count, notes=[note]) for count in (1, 2))
    more = [found.as_json()["devices"][0]["peak_device_spread"] for found in (one, two)]
    assert [spread["high"] - spread["expected"] for spread in more] == [2 * GIB, 4 * GIB]
