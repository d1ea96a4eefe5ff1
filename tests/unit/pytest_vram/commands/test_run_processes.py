"""The processes of a dry run: read back from their files, and which of them lived at once."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram.commands.run_processes import FIGURES, RunProcess, absent, at_once, concerned, killed_early, read
from pytest_vram.memory import Work
from pytest_vram.memory.codec import encode
from pytest_vram.memory.run_record import CardRecord, RunRecord

if TYPE_CHECKING:
    from pathlib import Path

SECOND = 10**9


def card(size: int, *, ooms: int = 0) -> CardRecord:
    sizes = dict.fromkeys(FIGURES, size)
    return CardRecord(index=0, **sizes, total_bytes=99, num_alloc_retries=0, num_ooms=ooms, work=Work())


@pytest.mark.parametrize(
    ("lives", "most", "together"),
    [
        ([], 0, 0),
        ([(0, 2, 5), (2, 4, 7)], 7, 1),  # the second begins as the first ends
        ([(0, 3, 5), (2, 4, 7)], 12, 2),
        ([(0, 9, 1), (1, 2, 5), (3, 4, 6), (5, 6, 2)], 7, 2),  # a parent, and children one after another
        ([(0, None, 5), (8, 9, 7)], 12, 2),  # killed: taken to live on
        ([(2, 4, 7), (0, 3, 5)], 12, 2),  # in any order
    ],
)
def test_only_peaks_of_processes_that_live_at_once_are_added(
    lives: list[tuple[int, int | None, int]], most: int, together: int
) -> None:
    shares = [(RunProcess(pid=i, used_seconds=s, ended_seconds=e), card(size)) for i, (s, e, size) in enumerate(lives)]
    assert at_once(shares) == (dict.fromkeys(FIGURES, most), together)


def rank(number: int, **more: Any) -> RunProcess:
    usual = {"pid": 100 + number, "rank": number, "local_rank": number, "local_world_size": 2, "group": "g"}
    return RunProcess(**(usual | {"devices": ()} | more))


def test_helpers_of_a_rank_do_not_stand_for_it() -> None:
    """Workers of a data loader inherit the rank, use no card, and are killed when they are not needed any more."""
    worker = rank(0, pid=900, devices=None)
    with_card = rank(0, pid=901, devices=None, used_seconds=2.0)
    assert [p.pid for p in concerned([rank(0), rank(1), worker, with_card])] == [100, 101, 901]


def test_the_process_in_which_a_rank_writes_a_checkpoint_is_its_helper() -> None:
    """torch gives it a group of its own with the same rank, and ends it by a signal."""
    writers = [rank(i, pid=900 + i, parent=100 + i, group="h", devices=None, killed="was killed") for i in (0, 1)]
    assert [p.pid for p in concerned([rank(0), rank(1), *writers])] == [100, 101]
    first_starts_the_second = [rank(0), rank(1, parent=100, devices=None)]
    assert [p.pid for p in concerned(first_starts_the_second)] == [100, 101]


def test_a_group_counts_from_its_last_start() -> None:
    before = [rank(i, restart=0, exit_code=1, pid=50 + i) for i in (0, 1)]
    assert [p.pid for p in concerned([*before, rank(0, restart=1), rank(1, restart=1)])] == [100, 101]


def test_a_process_without_rank_and_card_is_of_no_concern() -> None:
    assert concerned([RunProcess(pid=1, exit_code=3)]) == []


def test_ranks_that_never_came_are_named() -> None:
    assert absent([rank(1)]) == ["local rank 0 never imported torch"]
    assert absent([rank(0), rank(1)]) == []


def left(folder: Path, pid: int, **more: Any) -> None:
    usual: dict[str, Any] = {"parent": 1, "argv": ("a.py",), "started_ns": 5 * SECOND, "used_ns": 6 * SECOND}
    record = RunRecord(pid=pid, **(usual | more))
    (folder / f"{pid}-{record.started_ns}.json").write_text(json.dumps(encode(record)))


def test_records_are_read_with_the_exit_codes_beside_them(tmp_path: Path) -> None:
    left(tmp_path, 2_000_001, devices=(card(5, ooms=1),), ended_ns=7 * SECOND)
    (tmp_path / f"2000001-{5 * SECOND}.exit").write_text(f"3 {8 * SECOND}\n")
    left(tmp_path, 2_000_002, started_ns=4 * SECOND)
    left(tmp_path, os.getpid(), started_ns=time.monotonic_ns())
    processes, records = read(tmp_path, SECOND)
    assert [process.pid for process in processes] == [2_000_002, 2_000_001, os.getpid()]
    killed, failed, running = processes
    assert (failed.used_seconds, failed.ended_seconds, failed.exit_code, failed.refusals) == (5.0, 7.0, 3, 1)
    assert failed.fault == "ended with exit code 3"
    assert killed.fault == "ended without leaving its figures: it was killed, or called os._exit"
    assert running.fault.startswith("still ran when the program had ended")
    assert [record.pid for record in records] == [2_000_001]


def test_the_signal_is_told_that_the_process_which_waited_saw(tmp_path: Path) -> None:
    left(tmp_path, 2_000_001)
    left(tmp_path, 2_000_002, started_ns=9 * SECOND)
    for pid, number in ((2_000_001, 9), (2_000_002, 15)):
        (tmp_path / f"{pid}.signal").write_text(f"{number} {8 * SECOND}\n")
    (tmp_path / "2000003.signal").write_text(f"11 {2 * SECOND}\n")
    processes = read(tmp_path, SECOND, out_of_memory=True)[0]
    killed, later = processes
    (early,) = killed_early(tmp_path, processes, out_of_memory=True)
    assert early.startswith("process 2000003 was killed by signal 11 (SIGSEGV), "), "it left no record"
    assert killed.fault.startswith("ended without leaving its figures: it was killed by signal 9 (SIGKILL), because")
    assert "memory ran out" in killed.fault
    assert killed.ended_seconds == 7.0
    assert later.killed == "", "an earlier process had that number"


def test_a_process_whose_number_another_one_has_now_does_not_run(tmp_path: Path) -> None:
    before_this_process_started = SECOND // 100
    left(tmp_path, os.getpid(), started_ns=before_this_process_started)
    (process,) = read(tmp_path, 0)[0]
    assert process.fault == "ended without leaving its figures: it was killed, or called os._exit"


def test_a_process_that_went_on_as_another_program_is_told_from_one_that_was_killed(tmp_path: Path) -> None:
    left(tmp_path, 2_000_003, used_ns=None)
    left(tmp_path, 2_000_003, started_ns=7 * SECOND, ended_ns=9 * SECOND, devices=(), exit_code=0)
    first, second = read(tmp_path, SECOND)[0]
    assert (first.ended, first.fault) == ("went on as another program", "")
    assert (second.ended, second.fault) == ("exit code 0", "")
