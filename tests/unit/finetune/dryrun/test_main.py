"""A dry run and a search as a user runs them, with made-up trials: the requests, their card, and the exit codes."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest

import pytest_vram.drygpu
from finetune import cli
from finetune.config import yaml_file
from finetune.config.settings import RunConfig
from finetune.dryrun import command
from finetune.dryrun.messages import Candidate, Found, Request, Result, Trial
from finetune.qlora import main
from pytest_vram.drygpu import find_card

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GIB = 2**30
TOTAL = find_card("rtx-4080").total_bytes


def trial(*, fits: bool = True, needs: int = 4 * GIB) -> Trial:
    return Trial(
        fits=fits,
        message="" if fits else "CUDA out of memory.",
        phases={"loading": 3 * GIB},
        categories={"weights": 3 * GIB},
        peak_allocated=needs,
        peak_reserved=needs,
        peak_device=needs,
        context=GIB // 2,
        total=TOTAL,
        managed=0,
        seconds=1.0,
        device="NVIDIA GeForce RTX 4080",
        dry=True,
    )


class Asked:
    """Takes the place of :func:`finetune.dryrun.command.in_trial_process`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Callable[[Request, int | None], Result]) -> None:
        self.requests: list[Request] = []
        self.cards: list[str | None] = []
        self.totals: list[int | None] = []
        self.answer = answer
        monkeypatch.setattr(command, "in_trial_process", self)

    def __call__(self, request: Request, card: str | None, *, total_bytes: int | None = None) -> Result:
        self.requests.append(request)
        self.cards.append(card)
        self.totals.append(total_bytes)
        return self.answer(request, total_bytes)


def too_large(total_bytes: int | None) -> Result:
    """Refused by the card, and 2 GiB more than it has on one that is roomy."""
    roomy = total_bytes is not None
    return Result(trials=(trial(fits=roomy, needs=TOTAL + 2 * GIB if roomy else TOTAL),))


def test_a_run_that_fits_is_asked_once_and_exits_0(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, lambda *_: Result(trials=(trial(),)))
    assert main(["--model", "mistral-7b", "--dry-run", "--gpu", "rtx-4080"]) == 0
    assert (asked.cards, asked.totals) == (["rtx-4080"], [None])


def test_a_run_that_does_not_fit_is_taken_again_where_there_is_room_and_exits_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = Asked(monkeypatch, lambda _, total: too_large(total))
    assert main(["--model", "mistral-7b", "--dry-run", "--gpu", "rtx-4080"]) == 3
    assert asked.totals == [None, command.ROOMY_BYTES]
    assert "missing   2.00 GiB" in capsys.readouterr().out


CHOSEN = {"micro_batch": 4, "accumulation": 4, "checkpointing": 12, "offload_activations": False, "split": "given"}


def choosing(request: Request, *, fits: bool = True) -> Result:
    chosen = CHOSEN if request.choose else None
    return Result(trials=(dataclasses.replace(trial(fits=fits), chosen=chosen, note="so" if chosen else ""),))


def test_a_dry_run_says_what_a_run_on_that_card_chooses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = Asked(monkeypatch, lambda request, _: choosing(request))
    file = tmp_path / "run.json"
    flags = ["--model", "mistral-7b", "--dry-run", "--gpu", "rtx-4080"]
    assert main([*flags, "--json", str(file)]) == 0
    assert [request.choose for request in asked.requests] == [True]
    text = capsys.readouterr().out
    assert "micro-batch 4, accumulation 4, paged-adamw: fits rtx-4080" in text
    assert "  chosen    so\n" in text
    figures = json.loads(file.read_text())
    assert figures["chosen"] == CHOSEN
    assert figures["command"].endswith("--micro-batch 4 --accumulation 4 --checkpointing 12 --no-offload-activations")


def test_what_is_given_is_measured_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, lambda request, _: choosing(request))
    given = ["--micro-batch", "1", "--checkpointing", "--offload-activations"]
    for flags in (given, ["--micro-batch", "2", "--no-checkpointing"]):
        assert main(["--model", "mistral-7b", *flags, "--dry-run", "--gpu", "rtx-4080"]) == 0
    for flags in (given[:2], given[2:], given[:2] + given[3:], given[:3]):
        assert main(["--model", "mistral-7b", *flags, "--dry-run", "--gpu", "rtx-4080"]) == 0
    assert [request.choose for request in asked.requests] == [False, False, True, True, True, True]


def test_what_was_chosen_is_what_a_larger_card_and_the_page_are_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = Asked(monkeypatch, lambda request, total: choosing(request, fits=total is not None))
    main(["--model", "mistral-7b", "--dry-run", "--gpu", "rtx-4080"])
    assert [request.choose for request in asked.requests] == [True, False]
    assert {name: asked.requests[1].settings[name] for name in CHOSEN} == CHOSEN
    asked = Asked(monkeypatch, lambda request, _: choosing(request))
    monkeypatch.setattr(command, "save_page", lambda *_: None)
    main(["--model", "mistral-7b", "--dry-run", "--gpu", "rtx-4080", "--html", str(tmp_path / "run.html")])
    assert [(request.choose, request.over_time) for request in asked.requests] == [(True, False), (False, True)]
    assert {name: asked.requests[1].settings[name] for name in CHOSEN} == CHOSEN


def test_a_search_that_needs_more_in_a_new_process_is_made_again_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    best = Candidate(settings={"micro_batch": 8, "accumulation": 2, "checkpointing": 12})
    needs = iter([TOTAL, int(0.98 * TOTAL), int(0.9 * TOTAL)])

    def answer(request: Request, _: int | None) -> Result:
        if request.kind == "search":
            return Result(found=Found(best=best, trials=1))
        return Result(trials=(trial(needs=next(needs)),))

    asked = Asked(monkeypatch, answer)
    assert main(["--model", "mistral-7b", "--fit", "--gpu", "rtx-4080"]) == 0
    limit = int(0.97 * TOTAL)
    step = int(0.03 * limit)
    searches = [request.limit_bytes for request in asked.requests if request.kind == "search"]
    assert searches == [limit, limit - max(TOTAL - limit, step), limit - max(TOTAL - limit, step) - step]


@pytest.mark.parametrize("dry", [True, False])
def test_a_gpu_that_this_process_sees_needs_no_name_and_has_no_larger_twin(
    monkeypatch: pytest.MonkeyPatch, dry: bool
) -> None:
    monkeypatch.setattr(pytest_vram.drygpu, "is_active", lambda: dry)
    monkeypatch.setattr(pytest_vram.drygpu, "real_gpu_present", lambda: not dry)
    asked = Asked(monkeypatch, lambda *_: Result(trials=(trial(fits=False),)))
    assert main(["--model", "mistral-7b", "--dry-run"]) == 3
    assert (asked.cards, asked.totals) == ([None], [None])


def test_a_search_leaves_a_little_of_the_card_free(monkeypatch: pytest.MonkeyPatch) -> None:
    best = Candidate(settings={"micro_batch": 8, "accumulation": 2, "checkpointing": 12})
    asked = Asked(monkeypatch, lambda *_: Result(trials=(trial(),), found=Found(best=best, trials=1)))
    assert main(["--model", "mistral-7b", "--fit", "--gpu", "rtx-4080"]) == 0
    assert asked.requests[0].limit_bytes == int(0.97 * TOTAL)


def test_a_search_that_finds_nothing_shows_what_the_run_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = Result(found=Found(best=None, trials=4))
    Asked(monkeypatch, lambda request, total: nothing if request.kind == "search" else too_large(total))
    assert main(["--model", "mistral-7b", "--fit", "--gpu", "rtx-4080"]) == 3
    text = capsys.readouterr().out
    assert "no setting of micro_batch, seq, checkpointing, rank fits rtx-4080" in text
    assert "missing   2.00 GiB" in text


def test_a_printed_command_trains_and_does_not_look() -> None:
    looked = cli.parse(["--model", "mistral-7b", "--rank", "8", "--dry-run", "--gpu", "rtx-4080"])
    assert command.command(looked) == "python -m finetune.qlora --model mistral-7b --rank 8"


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_a_trial_is_taken_on_the_gpu_wherever_the_run_would_train(device: str) -> None:
    asked = yaml_file.replace(RunConfig(), {"device": device, "output": "here", "gpu": "rtx-4080"})
    settings = command.trial_settings(asked)
    assert settings["device"] == "cuda"
    assert not {"output", "gpu", "dry_run", "resume"} & set(settings)
