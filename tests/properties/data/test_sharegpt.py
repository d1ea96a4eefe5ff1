"""Rows of ShareGPT: a ``conversations`` column, whose messages have ``from`` and ``value``."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tiny_tokenizers import tiny_tokenizer

from finetune.config.settings import DataConfig
from finetune.data.encode import encode
from finetune.data.messages import SHAREGPT_ROLES, read_messages
from finetune.data.rows import BadRowError, Row

TURNS = [
    {"from": "system", "value": "be brief"},
    {"from": "human", "value": "how much"},
    {"from": "gpt", "value": "four"},
    {"from": "human", "value": "and now"},
    {"from": "gpt", "value": "five"},
]
MESSAGES = [{"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} for turn in TURNS]


def encoded(**fields: Any) -> tuple[list[int], list[int], tuple[str, ...]]:
    found = encode(Row(fields=fields, source="rows.jsonl:1"), tiny_tokenizer(), DataConfig(seq=512))
    return found.input_ids.tolist(), found.labels.tolist(), found.unused


@pytest.mark.parametrize("conversation", [TURNS, MESSAGES, json.dumps(TURNS)])
def test_the_tokens_are_those_of_the_same_messages(conversation: Any) -> None:
    assert encoded(conversations=conversation) == encoded(messages=MESSAGES)
    assert encoded(messages=conversation) == encoded(messages=MESSAGES)


def test_keys_that_a_data_set_fills_with_null_are_not_there() -> None:
    turns = [
        {"from": "human", "value": "hi", "content": None, "role": None},
        {"from": "gpt", "value": "yo", "content": None, "tool_calls": None, "weight": None},
    ]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert read_messages(turns, "conversations") == messages
    assert read_messages([turn | {"from": None, "value": None} for turn in messages], "messages") == messages


def test_an_answer_that_is_withheld_stays_so() -> None:
    turns = [*TURNS[:4], TURNS[4] | {"weight": 0}]
    messages = [*MESSAGES[:4], MESSAGES[4] | {"weight": 0}]
    assert encoded(conversations=turns) == encoded(messages=messages)
    assert encoded(conversations=turns)[1] != encoded(conversations=TURNS)[1]


@pytest.mark.parametrize("value", [{"name": "add", "arguments": {"a": 1}}, [{"name": "add", "arguments": '{"a": 1}'}]])
@pytest.mark.parametrize("as_text", [True, False])
def test_a_function_call_is_a_tool_call_and_an_observation_its_result(value: Any, as_text: bool) -> None:
    turns = [
        {"from": "human", "value": "1 more"},
        {"from": "function_call", "value": json.dumps(value) if as_text else value},
        {"from": "observation", "value": "2"},
    ]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert read_messages(turns, "conversations") == [
        {"role": "user", "content": "1 more"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (
            {"from": "robot", "value": "a"},
            "message 2 of conversations is from 'robot'; it may be from human, user,",
        ),
        ({"from": 3, "value": "a"}, "message 2 of conversations is from 3;"),
        (
            {"from": "gpt", "value": None},
            "message 2 of conversations needs a role and a content, or a from and",
        ),
        ({"from": "gpt", "value": " "}, "the content of message 2 of conversations, an answer, is empty"),
        ({"value": "a"}, "message 2 of conversations needs a role and a content, or a from and"),
        ({"from": "function_call", "value": "add"}, "a function_call, is not a call with a name"),
        ({"from": "function_call", "value": [{"arguments": {}}]}, "a function_call, is not a call with a name"),
    ],
)
def test_a_turn_that_cannot_be_used_is_named(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRowError) as told:
        encoded(conversations=[TURNS[1], turn])
    assert message in str(told.value)


def test_a_misspelt_column_is_taken_for_the_nearest() -> None:
    with pytest.raises(BadRowError, match=r"conversation \(did you mean conversations\?\)"):
        encoded(conversation=TURNS)
