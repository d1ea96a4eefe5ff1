"""The figures of the ladder: by category, as a table, as JSON, and as a picture."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest

from finetune.ladder import command
from finetune.ladder.results import CACHED, PARTS, Ladder, Rung, as_json

if TYPE_CHECKING:
    from pathlib import Path

GIB = 2**30
SIZES = {part: GIB for part in PARTS if part != CACHED}


def rung(name: str, *, fits: bool, cached: int = GIB) -> Rung:
    return Rung(
        name=name,
        arithmetic=SIZES,
        measured=SIZES | {CACHED: cached},
        managed=0 if fits else GIB,
        fits=fits,
        seconds=1.0,
    )


LADDER = Ladder(
    model="mistral-7b",
    card="rtx-4080",
    total_bytes=16 * GIB,
    seq=512,
    micro_batch=1,
    rank=16,
    context_caveat="a guess, as it was not measured",
    rungs=(rung("full", fits=False, cached=20 * GIB), rung("LoRA", fits=True)),
)


def test_sums() -> None:
    assert LADDER.rungs[1].expected == (len(PARTS) - 1) * GIB
    assert LADDER.rungs[1].needed == len(PARTS) * GIB


def test_the_table_names_what_fits_and_by_how_much() -> None:
    text = command.render(LADDER)
    assert "rtx-4080 has 16.00 GiB" in text
    assert "does not fit: 1.9x the card" in text
    assert "fits, 69% of the card" in text
    assert len({len(line) for line in text.splitlines()[2:7]}) == 1  # columns line up


def test_the_caveat_of_the_context_is_shown_only_where_there_is_one() -> None:
    assert "context: a guess, as it was not measured." in command.render(LADDER)
    assert "context:" not in command.render(dataclasses.replace(LADDER, context_caveat=""))


def test_json_holds_every_figure_of_the_ladder() -> None:
    rungs = [dataclasses.asdict(rung) for rung in LADDER.rungs]
    assert json.loads(as_json(LADDER)) == dataclasses.asdict(LADDER) | {"rungs": rungs}


def test_each_rung_changes_what_its_name_says() -> None:
    rungs = list(command.RUNGS.values())
    for before, after, name in zip(rungs[4:], rungs[5:], list(command.RUNGS)[5:], strict=False):
        changed = {key for key in after if before.get(key) != after[key]}
        assert len(changed) == 1, name


def test_the_picture_says_how_far_the_context_can_be_trusted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from finetune.ladder.drawing import draw

    for ladder in (LADDER, dataclasses.replace(LADDER, context_caveat="")):
        draw(ladder, tmp_path / "ladder.svg")
        text = (tmp_path / "ladder.svg").read_text()
        assert ("CUDA context: a guess, as it was not measured." in text) == bool(ladder.context_caveat)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture_is_the_same_for_the_same_figures(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    from finetune.ladder.drawing import draw

    files = [tmp_path / f"{i}{suffix}" for i in (1, 2)]
    for file in files:
        draw(LADDER, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].stat().st_size > 10_000


@pytest.mark.parametrize("argument", [["--seq", "0"], ["--rank", "x"], ["--micro-batch", "-1"]])
def test_numbers_that_cannot_be(argument: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(argument)
    assert argument[1] in capsys.readouterr().err


def test_a_card_or_a_model_that_is_misspelt(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--gpu", "rtx-4800"]) == 2
    assert "rtx-4080" in capsys.readouterr().err
