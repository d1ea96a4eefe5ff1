"""A dry run's figures, put together from its processes and written for a terminal."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_vram.commands.run_summary import RunReport, combine, render
from pytest_vram.drygpu.cards import find_card
from pytest_vram.units import GIB, MIB

CARD = find_card("l4")
ITEM = {"location": "train.py:7", "operation": "item", "count": 3, "answered": False, "note": "read as zero"}


def record(index: int = 0, allocated: int = GIB, **more: Any) -> dict[str, Any]:
    device = {
        "index": index,
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": allocated + 2 * MIB,
        "peak_device_bytes": allocated + 302 * MIB,
        "context_bytes": 300 * MIB,
        "managed_bytes": more.pop("managed", 0),
        "total_bytes": CARD.total_bytes,
        "num_alloc_retries": more.pop("retries", 0),
        "num_ooms": more.pop("ooms", 0),
    }
    usual = {
        "host_reads": [],
        "missing_functions": [],
        "not_counted": [],
        "out_of_memory": "",
        "versions": {"torch": "2"},
    }
    return {"devices": [device], **usual, **more}


def report(*records: dict[str, Any], code: int = 0) -> RunReport:
    return combine(records, card=CARD, count=1, total_bytes=None, code=code, seconds=1.25, conf=None)


def test_one_process() -> None:
    found = report(record())
    assert found.fits is True
    assert found.as_json()["peak_device_bytes"] == GIB + 302 * MIB
    assert render(found).splitlines()[1:] == [
        "=== dry run on 1 x NVIDIA L4: allocator-exact, nothing was computed ===",
        "peak allocated     1.00 GiB",
        "peak reserved      1.00 GiB",
        "peak on device     1.29 GiB (with 300 MiB of CUDA context): fits 22.0 GiB with 20.7 GiB to spare",
        "ended with         exit code 0 after 1.2 s",
    ]


def test_processes_on_one_card_are_added_up() -> None:
    found = report(record(allocated=12 * GIB), record(allocated=12 * GIB))
    (device,) = found.devices
    assert device.processes == 2
    assert device.peak_allocated_bytes == 24 * GIB
    assert found.fits is False
    assert "DOES NOT FIT 22.0 GiB: 2.56 GiB too much" in render(found)


def test_cards_are_kept_apart_and_the_worst_is_at_the_top() -> None:
    found = report(record(0, GIB), record(1, 3 * GIB))
    assert [device.peak_allocated_bytes for device in found.devices] == [GIB, 3 * GIB]
    assert found.as_json()["peak_allocated_bytes"] == 3 * GIB
    assert "GPU 0" in render(found)


def test_out_of_memory_does_not_fit_however_little_was_held() -> None:
    found = report(record(ooms=1, out_of_memory="CUDA out of memory. Tried"), code=1)
    assert found.fits is False
    assert "DID NOT FIT: 1 out-of-memory error\n" in render(found)
    assert "OUT OF MEMORY: CUDA out of memory. Tried" in render(found)


def test_nothing_on_the_gpu_is_no_verdict() -> None:
    found = report()
    assert found.fits is None
    assert found.as_json()["peak_allocated_bytes"] is None
    assert "no process used the GPU" in render(found)


@pytest.mark.parametrize(("code", "exit_code", "number"), [(3, 3, None), (-9, 137, 9), (-2, 130, 2)])
def test_signals_become_the_shells_exit_codes(code: int, exit_code: int, number: int | None) -> None:
    found = report(record(), code=code)
    assert (found.exit_code, found.signal) == (exit_code, number)


def test_reads_of_one_line_are_added_up_and_guesses_come_first() -> None:
    spread = {**ITEM, "answered": True, "note": "indices taken as spread evenly"}
    known = {**ITEM, "answered": True, "note": "", "count": 5}
    found = report(record(host_reads=[ITEM, known, spread]), record(host_reads=[ITEM]))
    assert [(read.count, read.answered) for read in found.host_reads] == [(6, False), (5, True), (3, True)]
    text = render(found)
    assert "host reads         5 answered with the program's own values; the figures rest on these guesses:" in text
    assert "       6 x item, train.py:7: read as zero" in text
    assert "       3 x item, train.py:7: indices taken as spread evenly" in text


def test_many_guesses_are_cut_short() -> None:
    reads = [{**ITEM, "location": f"train.py:{line}"} for line in range(20)]
    assert "  and 8 more places (--json lists all)" in render(report(record(host_reads=reads)))


def test_what_is_missing_or_not_counted_is_said() -> None:
    found = report(record(missing_functions=["cudnnFoo"], not_counted=["cuFFT (_fft_r2c)"], managed=GIB, retries=2))
    text = render(found)
    assert "CUDA functions that the dry GPU has not got: cudnnFoo" in text
    assert "not counted: workspace of cuFFT (_fft_r2c)" in text
    assert "managed (paged)    1.00 GiB, not counted above" in text
    assert "cache flushes      2 (allocations that succeeded only after one)" in text
