"""The process behind --dry-run reads a request and writes a result; the bench is a fake with fixed answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from finetune.dryrun import trial_process
from finetune.dryrun.messages import Found, Refusal, Request, Result, Trial
from finetune.dryrun.recording import TrialRecorder
from finetune.errors import ConfigError, DataError, MissingModelError, Problem, RankLostError
from pytest_vram.memory.codec import decode, encode

if TYPE_CHECKING:
    from finetune.config.settings import RunConfig

TRIAL = Trial(
    fits=True,
    message="",
    phases={},
    categories={},
    peak_allocated=1,
    peak_reserved=2,
    peak_device=3,
    context=1,
    total=16,
    managed=0,
    seconds=0.5,
)


class FakeBench:
    """Keeps what it is asked."""

    refused: Trial | None = None
    base = None
    made: list[FakeBench]

    def __init__(self, config: RunConfig, folder: Path, recorder: TrialRecorder | None) -> None:
        assert folder.is_dir()
        self.config, self.recorder = config, recorder
        self.ran: list[RunConfig] = []
        self.made.append(self)

    def run(self, config: RunConfig) -> Trial:
        self.ran.append(config)
        return TRIAL

    def run_chosen(self, config: RunConfig) -> Trial:
        return replace(self.run(config), chosen={"micro_batch": 7})


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> type[FakeBench]:
    kind = type("Bench", (FakeBench,), {"made": []})
    monkeypatch.setattr(trial_process, "Bench", kind)
    return kind


def answered(folder: Path, request: Request) -> Result:
    files = [folder / "request.json", folder / "result.json"]
    files[0].write_text(json.dumps(encode(request)))
    trial_process.main(*files)
    return decode(Result, json.loads(files[1].read_text()))


def test_one_base_for_all_changes(bench: type[FakeBench], tmp_path: Path) -> None:
    changes = ({"rank": 4}, {"rank": 8, "targets": ["q_proj"]})
    settings = {"model": "mistral-7b", "output": "there"}
    result = answered(tmp_path, Request(kind="run", changes=changes, settings=settings))
    assert result.trials == (TRIAL, TRIAL)
    (made,) = bench.made
    assert made.recorder is None
    assert made.config.output.output == Path("there")
    assert [config.adapter.rank for config in made.ran] == [4, 8]
    assert made.ran[1].adapter.targets == ("q_proj",)
    assert made.ran[1].model.model == "mistral-7b"


@pytest.mark.usefixtures("bench")
def test_what_is_open_is_chosen_where_the_request_says_so(tmp_path: Path) -> None:
    for choose, expected in ((False, None), (True, {"micro_batch": 7})):
        request = Request(kind="run", settings={}, choose=choose)
        assert answered(tmp_path, request).trials[0].chosen == expected


def test_a_base_that_is_refused_ends_it(bench: type[FakeBench], tmp_path: Path) -> None:
    bench.refused = TRIAL
    assert answered(tmp_path, Request(kind="run", changes=({}, {}), settings={})).trials == (TRIAL,)
    assert bench.made[0].ran == []


def test_a_search_gets_what_is_open_and_the_limit(
    bench: type[FakeBench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import finetune.dryrun.search

    asked: list[dict[str, Any]] = []
    nothing = Found(best=None, trials=0)
    monkeypatch.setattr(finetune.dryrun.search, "search", lambda *_, **settings: asked.append(settings) or nothing)
    request = Request(kind="search", open_settings=("seq",), limit_bytes=5, settings={})
    assert answered(tmp_path, request).found == nothing
    assert asked == [{"open_settings": ("seq",), "limit_bytes": 5, "ranks": 1}]


class Silent:
    """A history, or a recorder, of nothing."""

    started = 0

    def start(self) -> None:
        Silent.started += 1


def test_phases_over_time(bench: type[FakeBench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_vram.probe.history.History", Silent)
    monkeypatch.setattr("pytest_vram.probe.recorder.Recorder", Silent)
    monkeypatch.setattr(Silent, "started", 0)
    answered(tmp_path, Request(kind="run", over_time=True, settings={}))
    watch = bench.made[0].recorder
    assert isinstance(watch, TrialRecorder)
    assert Silent.started == 2
    watch.phase("loading", 0.0, 10)
    watch.phase("forward and backward", 1e6, 20)
    first, second = watch.phases
    assert (first.name, first.peak.allocated_bytes) == ("loading", 10)
    assert first.start == pytest.approx(first.end)
    assert second.start == 0.0  # it cannot have begun before the record
    assert second.end >= first.end


def test_what_cannot_be_used_is_written_as_an_answer(
    tmp_path: Path, bench: type[FakeBench], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise ConfigError(Problem(field="targets", value=("x", "y"), why="no such layer", remedy="use all-linear"))

    monkeypatch.setattr(trial_process, "Bench", refuse)
    refusal = answered(tmp_path, Request(kind="run", settings={"model": "mistral-7b"})).refusal
    assert refusal is not None
    assert refusal.kind == "setting"
    assert refusal.problems == (
        Problem(field="targets", value="('x', 'y')", why="no such layer", remedy="use all-linear"),
    )
    missing = trial_process.refusal(MissingModelError("no such folder"))
    assert missing == Refusal(kind="missing", message="no such folder")
    assert trial_process.refusal(DataError("rows.jsonl:2")) == Refusal(kind="data", message="rows.jsonl:2")


def test_a_rank_whose_neighbour_is_gone_leaves_no_result_and_says_so(
    bench: type[FakeBench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command that started the ranks says how the neighbour ended, which this process cannot know."""

    def run(self: FakeBench, config: RunConfig) -> Trial:
        raise RankLostError("rank 1 is gone")

    monkeypatch.setattr(bench, "run", run)
    with pytest.raises(SystemExit) as ended:
        answered(tmp_path, Request(kind="run", changes=({},), settings={"model": "mistral-7b"}))
    assert ended.value.code == 6
    assert not (tmp_path / "result.json").exists()
    assert "rank 1 is gone" in capfd.readouterr().err
