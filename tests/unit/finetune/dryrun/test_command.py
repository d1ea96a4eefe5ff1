"""What --dry-run and --fit print, and what they refuse before anything runs."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from finetune import cli, qlora
from finetune.config import yaml_file
from finetune.config.settings import RunConfig
from finetune.dryrun import command, trial_process
from finetune.dryrun.messages import Candidate, Found, Request, Result, Trial
from finetune.dryrun.report import Outcome, render
from finetune.errors import ConfigError, FinetuneError, MissingModelError, ModelError, Problem
from finetune.qlora import main
from pytest_vram.memory import HostRead
from pytest_vram.memory.codec import encode

if TYPE_CHECKING:
    from pathlib import Path

GIB = 2**30
TRIAL = Trial(
    fits=True,
    message="",
    phases={"loading": 4 * GIB, "forward and backward": 5 * GIB},
    categories={"weights": 4 * GIB, "activations": GIB},
    peak_allocated=5 * GIB,
    peak_reserved=6 * GIB,
    peak_device=6 * GIB + GIB // 2,
    context=GIB // 2,
    total=16 * GIB,
    managed=GIB // 4,
    seconds=7.0,
    device="NVIDIA GeForce RTX 4080",
    dry=True,
)


def config(**settings: Any) -> RunConfig:
    return yaml_file.replace(RunConfig(), {"model": "mistral-7b"} | settings)


def test_a_run_that_fits_is_told_with_its_headroom() -> None:
    text = render(config(), "rtx-4080", Outcome(trial=TRIAL))
    assert "fits rtx-4080" in text
    assert "needs     6.50 GiB of 16.00 GiB (41%)" in text
    assert "headroom  9.50 GiB" in text
    assert "0.25 GiB in managed memory" in text
    assert "dry GPU" in text


def test_a_run_that_does_not_fit_is_told_what_is_missing() -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"
    trial = replace(TRIAL, fits=False, message=said, categories={})
    text = render(config(), "rtx-4060", Outcome(trial=trial, roomy=replace(TRIAL, peak_device=20 * GIB)))
    assert "does NOT fit rtx-4060" in text
    assert "missing   4.00 GiB" in text
    assert "Tried to allocate 2.00 GiB" in text
    assert "    weights               4.00 GiB" in text  # of the steps that came to their end


def test_a_real_gpu_is_not_called_dry() -> None:
    text = render(config(), None, Outcome(trial=replace(TRIAL, dry=False)))
    assert "fits NVIDIA GeForce RTX 4080" in text
    assert "measured on the GPU" in text
    assert "dry" not in text


def test_what_was_assumed_is_told_and_what_changes_nothing_is_not() -> None:
    notes = (
        "indices taken as spread evenly (experts); in modeling_mixtral.py:100",
        "indices taken as spread evenly (experts); in modeling_mixtral.py:104",
        "computed on the device: read as zero",
    )
    reads = tuple(HostRead(location="x.py:1", operation="item", count=1, answered=False, note=note) for note in notes)
    text = render(config(), "rtx-4080", Outcome(trial=replace(TRIAL, host_reads=reads)))
    assert text.count("rests on  indices taken as spread evenly (experts)\n") == 1
    assert "modeling_mixtral" not in text
    assert "read as zero" not in text


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch": 38, "split": "given"},
        {"checkpointing": "none", "double_quant": False},
        {"checkpointing": 12},
        {"targets": ("q_proj", "v_proj"), "rank": 8, "rslora": True},
        {"data": "my rows.jsonl", "question": "What is it?"},
    ],
)
def test_the_command_that_is_printed_gives_the_same_run(settings: dict[str, Any]) -> None:
    asked = config(**settings)
    words = shlex.split(command.command(asked))
    assert words[:3] == ["python", "-m", "finetune.qlora"]
    assert cli.parse(words[3:]) == asked


@pytest.mark.parametrize(
    "flags",
    [["--batch", "32"], ["--batch", "16", "--micro-batch", "4"], ["--batch", "16", "--micro-batch", "1"]],
)
def test_the_command_of_a_run_with_a_batch_is_accepted(flags: list[str]) -> None:
    asked = cli.parse(["--model", "x/y", "--data", "d.jsonl", *flags])
    assert cli.parse(shlex.split(command.command(asked))[3:]).train == asked.train


def test_fit_splits_a_given_batch_and_leaves_its_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []

    def answer(request: Request, *_: Any, **__: Any) -> Result:
        opened.extend(request.open_settings)
        best = Candidate(settings={"micro_batch": 8, "accumulation": 4, "checkpointing": 12})
        return Result(trials=(TRIAL,), found=Found(best=best, trials=1))

    monkeypatch.setattr(command, "in_trial_process", answer)
    flags = ["--model", "mistral-7b", "--data", "d.jsonl", "--batch", "32"]
    assert main([*flags, "--fit", "--gpu", "rtx-4080"]) == 0
    assert set(opened) == {"micro_batch", "seq", "checkpointing", "rank"}
    (printed,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  python -m"))
    train = cli.parse(shlex.split(printed)[3:]).train
    assert (train.batch, train.micro_batch, train.accumulation, train.split) == (32, 8, 4, "given")
    assert train.checkpointing == 12


def test_the_settings_go_through_json_and_back() -> None:
    from finetune.dryrun.trial_process import from_plain

    asked = config(targets=("q_proj",), seq=77)
    again = yaml_file.replace(RunConfig(), from_plain(command.trial_settings(asked)))
    assert (again.adapter, again.data, again.train) == (asked.adapter, asked.data, asked.train)


def test_a_card_that_is_misspelt(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "mistral-7b", "--dry-run", "--gpu", "rtx-4800"]) == 2
    assert "did you mean rtx-4090 or rtx-4080" in capsys.readouterr().err


def test_a_card_is_known_by_the_name_in_the_table_however_it_is_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards: list[str | None] = []

    def answer(request: Request, card: str | None, **_: Any) -> Result:
        cards.append(card)
        return Result(trials=(TRIAL,))

    monkeypatch.setattr(command, "in_trial_process", answer)
    assert main(["--model", "mistral-7b", "--dry-run", "--gpu", "RTX 4080"]) == 0
    assert cards == ["rtx-4080"]
    assert "fits rtx-4080" in capsys.readouterr().out


def test_no_card_and_no_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import pytest_vram.drygpu

    monkeypatch.setattr(pytest_vram.drygpu, "real_gpu_present", lambda: False)
    assert main(["--model", "mistral-7b", "--dry-run"]) == 2
    assert "--gpu rtx-4080" in capsys.readouterr().err


def test_no_card_where_there_is_a_gpu_measures_on_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pytest_vram.drygpu

    cards: list[str | None] = []

    def answer(request: Request, card: str | None, **_: Any) -> Result:
        cards.append(card)
        return Result(trials=(replace(TRIAL, dry=False),))

    monkeypatch.setattr(pytest_vram.drygpu, "real_gpu_present", lambda: True)
    monkeypatch.setattr(command, "in_trial_process", answer)
    assert main(["--model", "mistral-7b", "--dry-run"]) == 0
    assert cards == [None]
    assert "measured on the GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--html", "run.html"], "add --dry-run or --fit"),
        (["--dry-run", "--gpu", "rtx-4080", "--html", "run.pdf"], "use --html run.html"),
        (["--fit", "--gpu", "rtx-4080", "--json", "run"], "use --json run.json"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", "mistral-7b", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_told_after_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "in_trial_process", lambda *_, **__: Result(trials=(TRIAL,)))
    file = tmp_path / "missing" / "run.json"
    assert main(["--model", "mistral-7b", "--dry-run", "--gpu", "rtx-4080", "--json", str(file)]) == 4
    told = capsys.readouterr()
    assert "fits rtx-4080" in told.out
    assert f"{file} cannot be written: No such file" in told.err


def test_a_model_that_is_misspelt_is_told_its_neighbours_without_asking_a_hub() -> None:
    with pytest.raises(ConfigError, match="did you mean mistral-7b"):
        command.main(yaml_file.replace(config(model="mistrl-7b"), {"dry_run": True, "gpu": "rtx-4080"}))


def test_fit_searches_what_was_left_open_and_prints_the_command_and_the_runners_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[Any] = []
    opened: list[str] = []

    def answer(request: Request, *_: Any, **__: Any) -> Result:
        if request.kind == "search":
            opened.extend(request.open_settings)
            settings = {"micro_batch": 8, "accumulation": 2, "checkpointing": 12, "rank": 16, "seq": 1024}
            best = Candidate(settings=settings, tokens_per_second=1745.4, needed=15 * GIB)
            other = Candidate(settings=settings | {"checkpointing": "all"}, tokens_per_second=1265, needed=9 * GIB)
            return Result(found=Found(best=best, others=(other,), trials=5))
        tried.append((request.settings["micro_batch"], request.settings["checkpointing"], request.choose))
        return Result(trials=(TRIAL,))

    monkeypatch.setattr(command, "in_trial_process", answer)
    assert main(["--model", "mistral-7b", "--seq", "1024", "--fit", "--gpu", "rtx-4080"]) == 0
    text = capsys.readouterr().out
    assert opened == ["micro_batch", "checkpointing", "rank"]
    assert tried == [(8, 12, False)]  # confirmed in a process of its own
    best = "1,745 tokens/s estimated, 15.00 GiB estimated: --micro-batch 8 --accumulation 2 --checkpointing 12\n"
    assert f"these        {best}" in text
    assert "or           1,265 tokens/s estimated, 9.00 GiB estimated: " in text
    assert "python -m finetune.qlora --model mistral-7b --seq 1024 --micro-batch 8 --accumulation 2 --check" in text


def test_fit_for_several_cards_searches_with_all_ranks_and_prints_the_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, int, int | None]] = []

    def answer(request: Request, _card: str | None, *, total_bytes: int | None = None) -> Result:
        asked.append((request.kind, request.ranks, total_bytes))
        if request.kind == "search":
            settings = {"micro_batch": 4, "accumulation": 4, "checkpointing": "none", "rank": 16, "seq": 512}
            best = Candidate(settings=settings, tokens_per_second=2818, needed=11 * GIB)
            return Result(found=Found(best=best, trials=1))
        return Result(trials=(replace(TRIAL, by_rank=(TRIAL, replace(TRIAL, rank=1))),))

    monkeypatch.setattr(command, "in_trial_process", answer)
    monkeypatch.setattr(qlora, "_require_sharding", lambda: None)  # torch 2.6 cannot, and nothing is sharded here
    assert main(["--model", "mistral-7b", "--fit", "--gpu", "rtx-4080", "--count", "2", "--shard"]) == 0
    text = capsys.readouterr().out
    assert asked == [("search", 2, command.ROOMY_BYTES), ("run", 2, None)]
    assert "fits 2 x rtx-4080, sharded" in text
    assert "that of 2 cards together, without the time in which they exchange tensors" in text
    trains = "torchrun --nproc-per-node 2 -m finetune.qlora --model mistral-7b --shard --micro-batch 4 --accumulation 4"
    assert trains in text


def test_fit_says_where_the_speed_is_not_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    best = Candidate(settings={"micro_batch": 2, "accumulation": 16, "checkpointing": "all"})
    result = Result(trials=(TRIAL,), found=Found(best=best, trials=1))
    monkeypatch.setattr(command, "in_trial_process", lambda *_, **__: result)
    flags = ["--seq", "1024", "--micro-batch", "2", "--rank", "8", "--fit", "--gpu", "rtx-4080"]
    assert main(["--model", "mistral-7b", *flags]) == 0
    text = capsys.readouterr().out
    assert "speed     not estimated: the arithmetic does not know this model" in text
    assert "tokens/s" not in text


def refused(monkeypatch: pytest.MonkeyPatch, error: FinetuneError) -> None:
    """Have the trial's process end with this error."""

    def run_(request: Path, *_: Any) -> tuple[list[Path], str]:
        result = request.with_name("result-0.json")
        result.write_text(json.dumps(encode(Result(refusal=trial_process.refusal(error)))))
        return [result], ""

    monkeypatch.setattr(command, "run_ranks", run_)
    monkeypatch.setattr(command, "_environment", lambda *_: {})


def asked(config: RunConfig) -> Result:
    request = Request(kind="run", settings=command.trial_settings(config))
    return command.in_trial_process(request, "rtx-4080")


@pytest.mark.parametrize("name", ["qwen2.5-7x", "./qwen2.5-7b"])
def test_a_model_that_cannot_be_used_is_not_called_misspelt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(monkeypatch, ModelError("precision: the experts in model.x have a form of their own; use bf16"))
    with pytest.raises(ModelError, match=r"experts in model\.x") as told:
        asked(config(model=name))
    assert "did you mean" not in str(told.value)


def test_a_setting_that_the_model_refuses_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(field="targets", value=("x",), why="no such layer", remedy="use all-linear")
    refused(monkeypatch, ConfigError(problem))
    with pytest.raises(ConfigError, match=r"targets = .*no such layer; use all-linear"):
        asked(config())


def test_a_name_that_is_nowhere_is_told_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    refused(monkeypatch, MissingModelError("model = 'qwen2.5-7bb': not found"))
    with pytest.raises(ConfigError, match=r"did you mean qwen2\.5-7b"):
        asked(config(model="qwen2.5-7bb"))
