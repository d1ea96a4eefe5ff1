"""The question that shows what a loss cannot: chosen without its answer, asked in the model's format, not echoed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from tiny_tokenizers import END, tiny_tokenizer

from finetune.config.settings import OutputConfig
from finetune.data.batches import Example
from finetune.data.encode import IGNORED
from finetune.training.sample import Question, answer, choose_question

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=30).filter(
    lambda text: "<|" not in text
)


def tokens(text: str) -> list[int]:
    return list(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def prompt_of(question: str) -> str:
    turns = [{"role": "user", "content": question}]
    return str(tiny_tokenizer().apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def row(question: str, reply: str) -> Example:
    prompt, rest = tokens(prompt_of(question)), tokens(f"{reply}{END}")
    labels = [IGNORED] * len(prompt) + rest
    return Example(input_ids=np.array(prompt + rest), labels=np.array(labels), source="here:1")


def chosen(held_out: list[Example], *, tokenizer: Any = None, **changes: Any) -> Question | None:
    return choose_question(OutputConfig(**changes), tokenizer or tiny_tokenizer(), held_out)  # type: ignore[arg-type]  # fields by name


@given(questions=st.lists(WORDS, min_size=1, max_size=4))
@settings(max_examples=max(5, settings.default.max_examples // 5))
def test_the_shortest_held_out_question_without_its_answer(questions: list[str]) -> None:
    found = chosen([row(question, "four") for question in questions])
    assert found is not None
    shortest = min(questions, key=lambda question: len(tokens(prompt_of(question))))
    assert found.text == shortest
    assert list(found.input_ids) == tokens(prompt_of(shortest))


def test_of_a_long_question_the_end_is_shown_and_all_is_asked() -> None:
    question = "a" * 300 + "b" * 300
    found = chosen([row(question, "four")])
    assert found is not None
    assert found.text == question[-400:]
    assert list(found.input_ids) == tokens(prompt_of(question))


def test_plain_text_has_no_question() -> None:
    ids = np.array(tokens("once upon a time"))
    assert chosen([Example(input_ids=ids, labels=ids, source="here:1")]) is None
    assert chosen([]) is None


def test_no_answer_is_no_question() -> None:
    assert chosen([row("2 and 2?", "four")], answer_tokens=0) is None
    assert chosen([], question="2 and 2?", answer_tokens=0) is None


def test_ones_own_question_is_asked_in_the_models_format_with_nothing_added() -> None:
    with_a_first_token = tiny_tokenizer(bos=True)
    found = chosen([row("1?", "one")], tokenizer=with_a_first_token, question="2 and 2?")
    assert found is not None
    assert found.text == "2 and 2?"
    assert with_a_first_token.decode(found.input_ids) == prompt_of("2 and 2?")


def test_a_model_without_a_format_is_asked_plainly() -> None:
    plain = tiny_tokenizer(chat=False)
    found = chosen([], tokenizer=plain, question="2 and 2?")
    assert found is not None
    assert plain.decode(found.input_ids) == "2 and 2?"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(vocab_size=len(tiny_tokenizer()), eos_token_id=tiny_tokenizer().eos_token_id)


@pytest.mark.parametrize("training", [False, True])
def test_the_answer_is_the_likeliest_and_disturbs_nothing(model: Any, training: bool) -> None:
    question = chosen([], question="2 and 2?")
    assert question is not None
    answers = set()
    for seed in range(3):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model.train(training)
        answers.add(answer(model, tiny_tokenizer(), question, max_tokens=8))
        assert torch.equal(torch.get_rng_state(), before)
        assert model.training == training
    (said,) = answers
    assert "2 and 2?" not in said
    # The first token is the likeliest of those not said yet, and nearly always of all.
    with torch.no_grad():
        logits = model(torch.tensor([question.input_ids])).logits[0, -1]
    spoken = torch.tensor(sorted(set(question.input_ids)))
    logits[spoken] = torch.where(logits[spoken] > 0, logits[spoken] / 1.1, logits[spoken] * 1.1)
    one = answer(model, tiny_tokenizer(), question, max_tokens=1)
    assert one == tiny_tokenizer().decode([int(logits.argmax())], skip_special_tokens=True).strip()
