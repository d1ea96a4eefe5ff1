"""The longest rows: only the answer grows, in whatever form a data set has it."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_vram.standins.rows import longest

USER, REPLY = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "because it is so"}


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"text": "a b", "source": "a long name of a source that is not the text"}, "text"),
        ({"instruction": "a very long instruction", "input": "", "output": "b"}, "output"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen, rejected"),
        (
            {"question": "how long is it?", "reply_of_the_oracle": "as long as it takes, and not a day more"},
            "reply_of_the_oracle",
        ),
        ({"text": ""}, "text"),
    ],
)
def test_a_column_of_text_has_that_many_words(row: dict[str, Any], columns: str) -> None:
    found, names = longest(row, 70)
    assert names == columns
    assert {name for name in row if found[name] != row[name]} == set(columns.split(", "))
    assert all(len(found[name].split()) == 70 for name in columns.split(", "))


@pytest.mark.parametrize(
    ("row", "column", "content"),
    [
        ({"messages": [USER, REPLY]}, "messages", "content"),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
            "conversations",
            "value",
        ),
        ({"prompt": [USER], "completion": [REPLY]}, "completion", "content"),
    ],
)
def test_of_messages_the_last_one_grows(row: dict[str, Any], column: str, content: str) -> None:
    found, names = longest(row, 70)
    assert names == column
    assert found[column][:-1] == row[column][:-1]
    assert len(found[column][-1][content].split()) == 70
    assert {**found[column][-1], content: ""} == {**row[column][-1], content: ""}


def test_numbers_of_tokens_get_that_length_all_alike() -> None:
    found, names = longest({"input_ids": [5, 6], "labels": [-100, 6], "id": 3, "text": "kept"}, 5)
    assert found == {"input_ids": [5, 6, 5, 6, 5], "labels": [-100, 6, -100, 6, -100], "id": 3, "text": "kept"}
    assert names == "input_ids, labels"


def test_a_row_without_text_is_left_as_it_is() -> None:
    assert longest({"score": 0.5, "flags": [True]}, 9) == ({"score": 0.5, "flags": [True]}, "")
