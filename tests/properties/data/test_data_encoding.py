"""Rows to tokens: nothing lost, nothing invented, and the loss on the answer alone, whatever the text and the cut."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import END, tiny_tokenizer

from finetune.config.settings import DataConfig
from finetune.data.encode import IGNORED, encode, targets
from finetune.data.rows import BadRowError, Row

if TYPE_CHECKING:
    from collections.abc import Callable

LONG = 1_000_000
MANY = settings(max_examples=settings.default.max_examples * 2)
TEXT = st.one_of(
    st.sampled_from(["the cat", " the answer is 24", "the", "th", "\n\n", "12 and 12", "e hat"]).map(lambda s: f"{s}."),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
        lambda s: s.strip() and "<|" not in s
    ),
)
TOKENIZERS = pytest.mark.parametrize("merges", [False, True], ids=["bytes", "merges"])


def coded(fields: Any, *, merges: bool = False, chat: bool = True, bos: bool = False, **changes: Any) -> Any:
    tokenizer = tiny_tokenizer(merges=merges, chat=chat, bos=bos)
    config = DataConfig(**{"seq": LONG} | changes)
    return encode(Row(source="rows.jsonl:1", fields=fields), tokenizer, config), tokenizer


def learned_text(result: Any, tokenizer: Any) -> str:
    return str(tokenizer.decode(result.labels[result.labels != IGNORED]))


def spelled(tokenizer: Any, ids: list[int]) -> str:
    """The bytes that tokens stand for, in the tokenizer's own letters: half a character has a spelling too."""
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def held_to_the_answer(result: Any, tokenizer: Any, prompt: str, completion: str) -> None:
    """Every token is there, and the answer's and its end are what is learned."""
    assert (
        tokenizer.decode(result.input_ids)
        == f"<|system|>be brief{END}<|user|>{prompt}{END}<|assistant|>{completion}{END}"
    )
    assert learned_text(result, tokenizer) == completion + END
    assert (result.labels[result.labels != IGNORED] == result.input_ids[result.labels != IGNORED]).all()


@TOKENIZERS
@given(prompt=TEXT, completion=TEXT)
@MANY
def test_a_prompts_answer_and_its_end_are_learned_and_nothing_else(merges: bool, prompt: str, completion: str) -> None:
    result, tokenizer = coded({"prompt": prompt, "completion": completion}, merges=merges)
    held_to_the_answer(result, tokenizer, prompt, completion)


MISTAKEN: dict[str, Callable[[Any, int], Any]] = {
    # The token that ends the answer is the padding token too.
    "masked by the padding token": lambda row, pad: np.where(row.input_ids == pad, IGNORED, row.labels),
    "the answer's first token is lost": lambda row, _: np.where(np.roll(row.labels, 1) == IGNORED, IGNORED, row.labels),
    "the token before the answer is learned": lambda row, _: np.where(
        np.roll(row.labels, -1) == IGNORED, row.labels, row.input_ids
    ),
    "everything is learned": lambda row, _: row.input_ids,
    "labels shifted twice": lambda row, _: np.roll(row.labels, 1),
}


@pytest.mark.parametrize("name", MISTAKEN)
def test_the_check_rejects_a_target_lost_or_invented(name: str) -> None:
    result, tokenizer = coded({"prompt": "the cat", "completion": "sat on"})
    held_to_the_answer(result, tokenizer, "the cat", "sat on")
    mistaken = replace(result, labels=MISTAKEN[name](result, tokenizer.pad_token_id))
    with pytest.raises(AssertionError):
        held_to_the_answer(mistaken, tokenizer, "the cat", "sat on")


@TOKENIZERS
@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), system=st.booleans())
@MANY
def test_every_assistant_turn_of_a_conversation_is_learned(
    merges: bool, turns: list[tuple[str, str]], system: bool
) -> None:
    messages = [{"role": "system", "content": "be kind"}] if system else []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    result, tokenizer = coded({"messages": messages}, merges=merges)
    assert learned_text(result, tokenizer) == "".join(answer + END for _, answer in turns)
    assert tokenizer.decode(result.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    last = {"prompt": messages[:-1], "completion": messages[-1:]}
    result, _ = coded(last, merges=merges)
    assert learned_text(result, tokenizer) == turns[-1][1] + END


def test_what_follows_the_last_answer_is_not_learned() -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    result, tokenizer = coded({"messages": [{"role": role, "content": text} for role, text in turns]})
    assert learned_text(result, tokenizer) == f"b{END}"
    assert tokenizer.decode(result.input_ids).endswith(f"<|user|>c{END}")


@TOKENIZERS
@pytest.mark.parametrize("bos", [False, True])
@given(text=TEXT, completion=TEXT)
@MANY
def test_without_a_template_the_text_is_the_text(merges: bool, bos: bool, text: str, completion: str) -> None:
    start = "<s>" if bos else ""
    result, tokenizer = coded({"text": text}, merges=merges, chat=False, bos=bos)
    assert tokenizer.decode(result.input_ids) == start + text + END
    assert learned_text(result, tokenizer) == text + END
    result, _ = coded({"prompt": text, "completion": completion}, merges=merges, chat=False, bos=bos)
    assert tokenizer.decode(result.input_ids) == start + text + completion + END
    # A token that holds the answer's first character is learned whole, though it may begin in the prompt.
    assert learned_text(result, tokenizer).endswith(completion + END)
    answer = spelled(tokenizer, tokenizer(completion + END, add_special_tokens=False)["input_ids"])
    learned = result.labels[result.labels != IGNORED].tolist()
    assert spelled(tokenizer, learned).endswith(answer)
    assert answer.endswith(spelled(tokenizer, learned[1:]))


def test_a_text_that_ends_itself_is_not_ended_twice() -> None:
    result, tokenizer = coded({"text": f"hello{END}"}, chat=False)
    assert tokenizer.decode(result.input_ids) == f"hello{END}"


def held_to_the_beginning(cut: Any, whole: Any, seq: int) -> None:
    assert np.array_equal(cut.input_ids, whole.input_ids[:seq])
    assert np.array_equal(cut.labels, whole.labels[:seq])
    assert len(cut.input_ids) + cut.cut == len(whole.input_ids)


@given(prompt=TEXT, completion=TEXT, seq=st.integers(2, 80))
@MANY
def test_a_cut_row_is_the_whole_rows_beginning(prompt: str, completion: str, seq: int) -> None:
    fields = {"prompt": prompt, "completion": completion}
    held_to_the_beginning(coded(fields, seq=seq)[0], coded(fields)[0], seq)


def test_the_check_rejects_a_row_cut_elsewhere() -> None:
    fields = {"prompt": "the cat", "completion": "sat on the mat"}
    whole, cut = coded(fields)[0], coded(fields, seq=20)[0]
    held_to_the_beginning(cut, whole, 20)
    for mistake in (
        {"input_ids": whole.input_ids[-20:], "labels": whole.labels[-20:]},
        {"labels": whole.labels[1:21]},
        {"input_ids": whole.input_ids[:19], "labels": whole.labels[:19]},
        {"cut": cut.cut - 1},
    ):
        with pytest.raises(AssertionError):
            held_to_the_beginning(replace(cut, **mistake), whole, 20)


@given(prompt=TEXT, completion=TEXT)
def test_training_on_the_prompt_learns_every_token(prompt: str, completion: str) -> None:
    result, _ = coded({"prompt": prompt, "completion": completion}, train_on_prompt=True)
    assert (result.labels == result.input_ids).all()
    assert targets(result.labels) == len(result.input_ids) - 1


@pytest.mark.parametrize("given_input", [None, "", "data"])
def test_alpaca_rows_in_a_template_and_in_their_own_words(given_input: str | None) -> None:
    fields = {"instruction": "add", "input": given_input, "output": "3"}
    result, tokenizer = coded(fields)
    asked = "add\n\ndata" if given_input else "add"
    assert f"<|user|>{asked}{END}" in tokenizer.decode(result.input_ids)
    assert learned_text(result, tokenizer) == f"3{END}"
    result, tokenizer = coded(fields, chat=False)
    context = "\n\n### Input:\ndata" if given_input else ""
    assert tokenizer.decode(result.input_ids) == f"### Instruction:\nadd{context}\n\n### Response:\n3{END}"
    assert learned_text(result, tokenizer) == f"3{END}"


def test_a_thought_that_only_the_prompt_opens_is_not_learned() -> None:
    tokenizer = tiny_tokenizer()
    plain, fields = tokenizer.chat_template, {"prompt": "a", "completion": "b"}
    try:
        tokenizer.chat_template = plain.replace("%}<|assistant|>{%", "%}<|assistant|><think>{%")
        result, _ = coded(fields)
    finally:
        tokenizer.chat_template = plain
    assert learned_text(result, tokenizer) == f"b{END}"


BAD: dict[str, tuple[Any, str]] = {
    "not a mapping": ([1, 2], "a list, not a mapping"),
    "no known columns": ({"promt": "a", "completion": "b"}, r"promt \(did you mean prompt\?\).*a row needs messages"),
    "nothing": ({}, "its columns are none"),
    "a number": ({"prompt": 3, "completion": "b"}, "prompt is a number, not text"),
    "an empty answer": ({"prompt": "a", "completion": " "}, "completion is empty"),
    "no messages": ({"messages": []}, "messages is an empty list"),
    "no assistant": ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn"),
    "a strange role": (
        {"messages": [{"role": "asistant", "content": "a"}]},
        r"'asistant' \(did you mean assistant\?\)",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "message 1 of messages needs a role and a content"),
    "an empty turn": ({"messages": [{"role": "assistant", "content": ""}]}, "an answer, is empty"),
    "parts": ({"messages": [{"role": "user", "content": [3]}]}, "content of message 1 of messages is a list"),
    "an odd input": ({"instruction": "a", "input": 3, "output": "b"}, "input is a number"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_row_is_said(name: str) -> None:
    fields, said = BAD[name]
    with pytest.raises(BadRowError, match=said):
        coded(fields)


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(BadRowError, match=r"need a chat template.*prompt \+ completion"):
        coded({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, chat=False)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    plain = tokenizer.chat_template
    messages = [{"role": r, "content": "a"} for r in ("user", "assistant", "user", "assistant")]
    try:
        tokenizer.chat_template = "{{ messages | length }}" + plain
        with pytest.raises(BadRowError, match="differently when others follow"):
            coded({"messages": messages})
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(BadRowError, match="roles must alternate"):
            coded({"messages": messages})
    finally:
        tokenizer.chat_template = plain
