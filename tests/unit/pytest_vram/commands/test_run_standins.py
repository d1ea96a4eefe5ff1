"""The options that replace what a program asks the hub for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import pytest

from pytest_vram.commands import run_standins
from pytest_vram.drygpu.process.variables import ROWS_FILE, ROWS_VARIABLE
from pytest_vram.errors import VramUsageError

if TYPE_CHECKING:
    from pathlib import Path


def parsed(*args: str) -> run_standins.StandIns:
    parser = argparse.ArgumentParser()
    run_standins.add_arguments(parser)
    return run_standins.from_arguments(parser.parse_args(args))


def words(*command: str, rows: str | None = None) -> int:
    found = parsed("--longest-rows", *([rows] if rows else []))
    with run_standins.in_place(found, command) as prepared:
        assert prepared.variables == {ROWS_VARIABLE: str(prepared.words)}
        return prepared.words


@pytest.mark.parametrize(
    "text",
    [
        "sequence_len: 2048",
        "tokenizer:\n  max_seq_len: 2_048\n",
        '{"cutoff_len": 2048}',
        "max_length = 2048",
        "max_seq_length: '2048'",
    ],
)
def test_the_length_is_read_from_the_configuration(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text(text)
    assert words("train", str(tmp_path / "x.yml")) == 2048


@pytest.mark.parametrize(
    "command",
    [
        "--max_length 512",
        "--max-length=512",
        "--train.max_seq_length 512",
        "tokenizer.max_seq_len=512",
        "--cutoff_len 512 --max_length 9",
    ],
)
def test_the_length_is_read_from_flags_and_the_largest_counts(command: str) -> None:
    assert words("train", *command.split()) == 512


def test_without_a_length_rows_are_long_and_a_number_wins() -> None:
    assert words("train", "--my_max_length_of_all 7") == 16_384
    assert words("train", "--max_length", "512", rows="33") == 33


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--data", "acme/rows"], "NAME=FILE"),
        (["--data", "acme/rows=x.tar"], r"ends in \.jsonl"),
        (["--data", "acme/rows=nowhere.jsonl"], "there is no file"),
        (["--shape", "a/b=llama-3.2-1b", "--shape", "a/b=llama-3.2-3b"], "given twice"),
    ],
)
def test_what_cannot_be(args: list[str], why: str) -> None:
    with pytest.raises(VramUsageError, match=why):
        parsed(*args)


@pytest.mark.parametrize("number", ["0", "-3", "many"])
def test_a_number_of_words_that_cannot_be(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(f"--longest-rows={number}")
    assert f"'{number}': write a number of words, 1 or more" in capsys.readouterr().err


def test_it_is_said_which_rows_were_replaced_and_that_none_were(tmp_path: Path) -> None:
    with run_standins.in_place(parsed("--longest-rows", "9"), ["train"]) as prepared:
        (note,) = prepared.notes_of(tmp_path)
        assert note.figures
        assert "replaced no data set" in note.text
        (tmp_path / ROWS_FILE).write_text("acme/rows: output\nacme/rows: output\n")
        (note,) = prepared.notes_of(tmp_path)
    assert not note.figures
    assert note.text.startswith("acme/rows: output in each row has 9 words; ")


def test_a_length_that_is_named_nowhere_is_said_to_be_a_guess(tmp_path: Path) -> None:
    (tmp_path / ROWS_FILE).write_text("acme/rows: output\n")
    for command, guessed in ((["train"], True), (["train", "--max_length", "512"], False)):
        with run_standins.in_place(parsed("--longest-rows"), command) as prepared:
            (note,) = prepared.notes_of(tmp_path)
        assert ("are a guess" in note.text) is guessed
        assert note.figures is guessed
