"""The trial processes of several ranks, and the one result that theirs make up."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from finetune.config import yaml_file
from finetune.config.settings import RunConfig
from finetune.dryrun import several
from finetune.dryrun.messages import Found, Refusal, Result, Trial
from finetune.dryrun.rank_bench import RankBench
from finetune.dryrun.report import Outcome, as_json, as_report, render
from finetune.dryrun.trial import Bench
from finetune.training import ranks
from pytest_vram.memory import HostRead, Note
from pytest_vram.memory.codec import decode, encode

if TYPE_CHECKING:
    from pathlib import Path

GIB = 2**30
FIRST = Trial(
    fits=True,
    message="",
    phases={"loading": GIB},
    categories={"weights": GIB},
    peak_allocated=5 * GIB,
    peak_reserved=6 * GIB,
    peak_device=7 * GIB,
    context=GIB,
    total=16 * GIB,
    managed=0,
    seconds=1.0,
    device="NVIDIA L4",
    dry=True,
    notes=(Note(name="NCCL", text="its buffers are counted by a rule", source="driver"),),
)
SECOND = replace(FIRST, rank=1, peak_device=8 * GIB, peak_allocated=6 * GIB)


def test_the_rank_that_needs_most_speaks_for_all() -> None:
    found = several.combined([Result(trials=(FIRST,)), Result(trials=(SECOND,))])
    assert found is not None
    (trial,) = found.trials
    assert (trial.rank, trial.peak_device) == (1, 8 * GIB)
    assert trial.by_rank == (FIRST, SECOND)
    assert decode(Result, json.loads(json.dumps(encode(found)))) == found


def test_a_rank_whose_memory_ran_out_needs_most_and_the_others_may_leave_nothing() -> None:
    refused = replace(FIRST, fits=False, message="CUDA out of memory.")
    for results in ([Result(trials=(refused,)), None], [Result(trials=(refused,)), Result(trials=(SECOND,))]):
        found = several.combined(results)
        assert found is not None
        assert found.trials[0].rank == 0
        assert not found.trials[0].fits


def test_a_rank_that_is_missing_for_no_reason_is_no_result() -> None:
    assert several.combined([Result(trials=(FIRST,)), None]) is None
    assert several.combined([None, None]) is None


def test_a_refusal_and_a_search_are_those_of_any_rank() -> None:
    refusal = Result(refusal=Refusal(kind="model", message="no"))
    assert several.combined([None, refusal]) == refusal
    search = Result(found=Found(best=None, trials=3))
    assert several.combined([search, search]) == search


def test_one_process_has_no_ranks() -> None:
    found = several.combined([Result(trials=(FIRST,))])
    assert found is not None
    assert found.trials == (FIRST,)


WRITES = """
import json, os, pathlib, sys
place = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}
pathlib.Path(sys.argv[2]).write_text(json.dumps(place))
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of the trial process: ``python -m finetune.dryrun.trial_process`` runs it."""
    package = tmp_path / "finetune" / "dryrun"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    return package / "trial_process.py"


def test_each_rank_is_told_its_place_and_a_single_process_none(program: Path, tmp_path: Path) -> None:
    program.write_text(WRITES)
    for count, sizes in ((2, "2"), (1, None)):
        files, failure = several.run_ranks(tmp_path / "request.json", count, several.alone())
        assert failure == ""
        found = [json.loads(file.read_text()) for file in files]
        assert [place["WORLD_SIZE"] for place in found] == [sizes] * count
        assert [place["RANK"] for place in found] == ([str(rank) for rank in range(count)] if sizes else [None])


@pytest.mark.parametrize(
    ("how", "grace", "told"),
    [
        ("sys.exit('no room here')", "_GRACE", "ended with exit code 1:\nno room here"),
        (
            "os.kill(os.getpid(), 11)",
            "_GRACE_KILLED",
            "was killed by signal 11 (SIGSEGV), because native code crashed:\n",
        ),
    ],
)
def test_a_rank_that_fails_is_told_and_the_others_are_not_waited_for(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, grace: str, told: str
) -> None:
    monkeypatch.setattr(several, grace, 0.1)
    program.write_text(f"import os, sys, time\nif os.environ['RANK'] == '0': time.sleep(50)\n{how}\n")
    files, failure = several.run_ranks(tmp_path / "request.json", 2, several.alone())
    assert not any(file.exists() for file in files)
    assert several.read_results(files) == [None, None]
    assert failure.startswith(f"rank 1 {told}")


@pytest.mark.parametrize(
    ("how", "told", "then"),
    [
        ("sys.exit('mine')", "ended with exit code 1:\nmine", "sys.exit('the other rank is gone')"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "was killed by signal 9 (SIGKILL), ",
            "sys.exit('the other rank is gone')",
        ),
        ("os._exit(0)", "ended with exit code 0:\nit printed nothing", "pathlib.Path(sys.argv[2]).touch()"),
        ("time.sleep(1); sys.exit('mine')", "ended with exit code 1:\nmine", "sys.exit(0)"),
    ],
)
def test_the_rank_that_failed_first_is_told_and_not_one_that_then_missed_it(
    program: Path, tmp_path: Path, how: str, told: str, then: str
) -> None:
    """Rank 0 ends because rank 1 has failed; in the last case before rank 1 has ended, and without a result."""
    mark = tmp_path / "gone"
    program.write_text(
        "import os, pathlib, signal, sys, time\n"
        f"mark = pathlib.Path({str(mark)!r})\n"
        "if os.environ['RANK'] == '1':\n"
        f"    mark.touch()\n    {how}\n"
        "while not mark.exists():\n    time.sleep(0.01)\n"
        f"time.sleep(0.5)\n{then}\n"
    )
    _, failure = several.run_ranks(tmp_path / "request.json", 2, several.alone())
    assert failure.startswith(f"rank 1 {told}")
    assert "gone" not in failure


def test_ranks_are_shown_side_by_side_the_largest_first() -> None:
    settings = {"model": "llama-2-70b", "shard": True, "count": 2, "dry_run": True, "gpu": "l4"}
    outcome = Outcome(trial=replace(SECOND, by_rank=(FIRST, SECOND)))
    text = render(yaml_file.replace(RunConfig(), settings), "l4", outcome)
    assert "fits 2 x l4, sharded" in text
    assert text.index("rank 1    8.00 GiB on its card") < text.index("rank 0    7.00 GiB on its card")
    assert "rank 1 needs 6.7% more than the mean" in text
    assert text.count("NCCL: its buffers") == 1
    figures = json.loads(as_json("torchrun", "l4", outcome))
    assert figures["count"] == 2
    assert [rank["peak_device_bytes"] for rank in figures["ranks"]] == [7 * GIB, 8 * GIB]
    assert [note["name"] for note in figures["notes"]] == ["NCCL"]
    (test,) = as_report("torchrun", outcome).tests
    assert [(m.device.index, m.peak.device_bytes) for m in test.measurements] == [(0, 7 * GIB), (1, 8 * GIB)]
    assert test.measurements[0].notes[0].name == "NCCL"


READ = HostRead(location="x.py:1", operation="item", count=1, answered=False)


def test_all_ranks_decide_by_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Trial] = []

    def gathered(own: Trial) -> list[Trial]:
        sent.append(own)
        return [own, SECOND]

    monkeypatch.setattr(Bench, "run", lambda *_, **__: replace(FIRST, host_reads=(READ,)))
    monkeypatch.setattr(ranks, "gathered", gathered)
    bench = object.__new__(RankBench)
    assert bench.run(RunConfig()) == SECOND
    assert sent == [FIRST]
    monkeypatch.setattr(Bench, "run", lambda *_, **__: replace(FIRST, fits=False, message="no room"))
    with pytest.raises(RuntimeError, match="no room"):
        bench.run(RunConfig())
