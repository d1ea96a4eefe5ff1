"""Conversations through chat templates: what is learned, what is refused by name, and what the text leaves out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHAT_TEMPLATE, END, tiny_tokenizer

from finetune.config.settings import DataConfig
from finetune.data.encode import IGNORED, encode
from finetune.data.rows import BadRowError, Row
from finetune.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

PLAIN = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = {
    "a mark for each role": PLAIN,
    "a system prompt of its own": CHAT_TEMPLATE,
    "no prompt for an answer, content stripped": (
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }} <|end|>"
        "{% else %}[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}"
    ),
    "a thought that only the prompt opens": PLAIN.replace(
        "generation_prompt %}<|assistant|>", "generation_prompt %}<|assistant|><think>\n"
    ),
    "an empty thought before the last answer to a question": (
        "{% set ns = namespace(asked=-1) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.role == 'assistant' and ns.asked >= 0 and loop.index0 > ns.asked %}<think></think>{% endif %}"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "a first message that must exist": "{{ messages[0].role[:0] }}" + PLAIN,
    "a question that must exist": (
        "{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
        "{{ raise_exception('no question') }}{% endif %}" + PLAIN
    ),
}
TOOLS_TEMPLATE = (
    "{% if tools %}<|system|>{% for t in tools %}{{ t.function.name }} {% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments | items %} {{ k }}={{ v }}{% endfor %}</call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT_ARGUMENTS = TOOLS_TEMPLATE.replace(
    "{% for k, v in c.function.arguments | items %} {{ k }}={{ v }}{% endfor %}", " {{ ' ' + c.function.arguments }}"
)
PRINTED_ARGUMENTS = TEXT_ARGUMENTS.replace("{{ ' ' + c.function.arguments }}", " {{ c.function.arguments }}")
WORDS = st.text(st.characters(codec="ascii", exclude_characters="<|>"), min_size=1, max_size=12).filter(
    lambda text: text.strip() == text and text != ""
)
TOOL = {"type": "function", "function": {"name": "mul"}}


@pytest.fixture(autouse=True)
def template_as_it_was() -> Iterator[None]:
    """Tokenizers are made once for all tests."""
    tokenizer = tiny_tokenizer()
    yield
    tokenizer.chat_template = CHAT_TEMPLATE


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", **({} if text is None else {"content": text}), **more}


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "mul", "arguments": arguments}}


def coded(fields: Any, template: Any = PLAIN, **changes: Any) -> tuple[Any, list[str], str]:
    """The encoded row, each stretch that is learned, and the whole text."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    result = encode(Row(source="rows.jsonl:1", fields=fields), tokenizer, DataConfig(**{"seq": 10**6} | changes))
    stretches: list[list[int]] = [[]]
    for token, label in zip(result.input_ids.tolist(), result.labels.tolist(), strict=True):
        if label != IGNORED:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return result, [tokenizer.decode(s) for s in stretches if s], tokenizer.decode(result.input_ids)


# Conversations that begin with the assistant.


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "a question that must exist"])
@given(greeting=WORDS, question=WORDS, answer=WORDS)
@settings(max_examples=settings.default.max_examples // 5)
def test_a_greeting_is_learned_as_it_is_behind_a_question(name: str, greeting: str, question: str, answer: str) -> None:
    template = TEMPLATES[name]
    greeted = [assistant(greeting), user(question), assistant(answer)]
    _, learned, whole = coded({"messages": greeted}, template)
    tokenizer = tiny_tokenizer()
    assert whole == tokenizer.apply_chat_template(greeted, tokenize=False)
    _, asked, _ = coded({"messages": [user(question), assistant(greeting)]}, template)
    assert learned[0] == asked[0].removeprefix("<think></think>")  # that is written behind questions only
    assert learned[1] == coded({"messages": [user(question), assistant(answer)]}, template)[1][0]


def test_a_greeting_alone_and_after_a_system_text_is_learned() -> None:
    assert coded({"messages": [assistant("hello")]})[1] == [f"hello{END}"]
    rules = {"role": "system", "content": "be kind"}
    assert coded({"messages": [rules, assistant("hello"), user("a"), assistant("b")]})[1] == [f"hello{END}", f"b{END}"]
    assert coded({"prompt": [rules], "completion": [assistant("hello")]})[1] == [f"hello{END}"]


def test_a_greeting_that_the_template_refuses_is_a_bad_row() -> None:
    with pytest.raises(BadRowError, match="no question"):
        coded({"messages": [assistant("hello")]}, TEMPLATES["a question that must exist"])
    told = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}" + PLAIN
    with pytest.raises(BadRowError, match="roles must alternate"):
        coded({"messages": [assistant("hello"), user("a"), assistant("b")]}, told)


def test_two_answers_in_a_row_are_both_learned() -> None:
    assert coded({"messages": [user("a"), assistant("b"), assistant("c")]})[1] == [f"b{END}", f"c{END}"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0].nothing.at_all }}", "UndefinedError"),
        ("{{ 1 + messages[0].content }}", "TypeError"),
        ("{{ messages[9].content | items }}", "the chat template refuses it"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages.append }}{{ messages.append(1) }}", "SecurityError"),
    ],
)
def test_whatever_a_template_raises_is_a_bad_row(template: str, said: str) -> None:
    with pytest.raises(BadRowError, match=rf"the chat template refuses it: .*|{said}") as caught:
        coded({"messages": [user("a"), assistant("b")]}, template)
    assert said in str(caught.value)


@pytest.mark.parametrize("template", ["\n{% for m in messages %}{{ m.c }", "\n{{ messages | no_such_filter }}"])
def test_a_template_that_is_none_is_no_fault_of_the_row(template: str) -> None:
    with pytest.raises(ModelError, match=r"chat template is broken in line 2: .*Mend chat_template\.jinja"):
        coded({"messages": [user("a"), assistant("b")]}, template)


def test_several_templates_without_a_default_are_no_fault_of_the_row() -> None:
    row, several = {"messages": [user("a"), assistant("b")]}, {"rag": PLAIN, "tool_use": TOOLS_TEMPLATE}
    with pytest.raises(ModelError, match=r"several chat templates \(rag, tool_use\), and none is named default"):
        coded(row, several)
    assert coded(row | {"tools": [TOOL]}, several)[1] == [f"b{END}"]


class PanicException(BaseException):
    """As pyo3 names what Rust code panics with: no ``Exception``."""


@pytest.mark.parametrize("error", [PanicException("index out of bounds"), TypeError("no text"), OSError("x")])
def test_whatever_a_tokenizer_raises_is_a_bad_row(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(type(tiny_tokenizer()), "__call__", fail)
    with pytest.raises(BadRowError, match=f"the tokenizer refuses its text: {type(error).__name__}: {error}"):
        coded({"messages": [user("a"), assistant("b")]})


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), SystemExit(1)])
def test_a_signal_and_a_lack_of_memory_are_no_fault_of_a_row(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(type(tiny_tokenizer()), "apply_chat_template", fail)
    with pytest.raises(type(error)):
        coded({"messages": [user("a"), assistant("b")]})


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "hi", "completion": "cut \ud83d"},
        {"text": "\udc00"},
        {"messages": [user("\ud83d"), assistant("b")]},
    ],
)
def test_half_a_character_is_named(fields: Any) -> None:
    with pytest.raises(BadRowError, match=r"half of a character, \\ud[0-9a-f]{3} \(a lone surrogate\)"):
        coded(fields)
    Row(source="a", fields=fields).beginning().encode()  # can be printed


# Tools.


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "JSON text"])
@pytest.mark.parametrize("content", ["look", "", None], ids=["text", "empty", "none"])
@pytest.mark.parametrize("arguments", [{"a": 3}, '{"a": 3}'], ids=["object", "JSON text"])
def test_tool_calls_are_learned_and_tools_are_in_the_prompt(tools: Any, content: str | None, arguments: Any) -> None:
    messages = [
        user("3*18"),
        assistant(content, tool_calls=[call(arguments)]),
        {"role": "tool", "content": "54"},
        assistant("54"),
    ]
    result, learned, whole = coded({"messages": messages, "tools": tools}, TOOLS_TEMPLATE)
    assert whole.startswith(f"<|system|>mul {END}<|user|>")
    assert learned == [f"{content or ''}<call>mul a=3</call>{END}", f"54{END}"]
    assert result.unused == ()


@pytest.mark.parametrize("template", [TEXT_ARGUMENTS, PRINTED_ARGUMENTS], ids=["refuses objects", "prints objects"])
@pytest.mark.parametrize("arguments", [{"a": "é"}, '{"a": "é"}'], ids=["object", "JSON text"])
def test_a_template_that_wants_arguments_as_text_gets_text(template: str, arguments: Any) -> None:
    messages = [user("a"), assistant(tool_calls=[call(arguments)])]
    assert '<call>mul  {"a": "é"}</call>' in coded({"messages": messages}, template)[1][0]


def test_a_call_without_arguments_goes_through_every_kind_of_template() -> None:
    as_json = PRINTED_ARGUMENTS.replace("c.function.arguments }}", "c.function.arguments | tojson }}")
    for arguments in ({}, "{}", ""):
        messages = [user("a"), assistant(tool_calls=[call(arguments)])]
        assert coded({"messages": messages}, TOOLS_TEMPLATE)[1] == [f"<call>mul</call>{END}"]
        for template in (TEXT_ARGUMENTS, as_json):
            assert coded({"messages": messages}, template)[1] == [f"<call>mul  {{}}</call>{END}"]


def test_arguments_that_are_no_json_object_stay_as_they_are() -> None:
    messages = [user("a"), assistant(tool_calls=[call("a b")])]
    assert "<call>mul  a b</call>" in coded({"messages": messages}, PRINTED_ARGUMENTS)[1][0]
    with pytest.raises(BadRowError, match="TypeError"):
        coded({"messages": messages}, TOOLS_TEMPLATE)


def test_a_tool_call_that_the_template_leaves_out_is_no_empty_answer() -> None:
    called = assistant(tool_calls=[call({})])
    with pytest.raises(BadRowError, match="message 2, an answer, has no content, and the chat template leaves out its"):
        coded({"messages": [user("a"), called]})


@pytest.mark.parametrize(
    ("tools", "said"), [("mul", "tools is not a list"), ([3], "tools is not a list"), ({"a": 1}, "tools is not a list")]
)
def test_tools_that_are_none_are_refused(tools: Any, said: str) -> None:
    with pytest.raises(BadRowError, match=said):
        coded({"messages": [user("a"), assistant("b")], "tools": tools}, TOOLS_TEMPLATE)


# What else a row says.


def test_a_turn_of_weight_zero_is_not_learned() -> None:
    messages = [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)]
    result, learned, whole = coded({"messages": messages})
    assert learned == [f"d{END}"]
    assert whole == f"<|user|>a{END}<|assistant|>b{END}<|user|>c{END}<|assistant|>d{END}"
    assert result.unused == ()
    _, learned, _ = coded({"messages": messages}, train_on_prompt=True)
    assert learned == [f"<|user|>a{END}<|assistant|>", f"<|user|>c{END}<|assistant|>d{END}"]
    with pytest.raises(BadRowError, match="no assistant turn to learn from"):
        coded({"messages": messages[:2]})
    with pytest.raises(BadRowError, match=r"the weight of message 2 of messages is 0\.5"):
        coded({"messages": [user("a"), assistant("b", weight=0.5)]})


@pytest.mark.parametrize("history", [[["hi", "arr"]], '[["hi", "arr"]]'], ids=["list", "JSON text"])
@pytest.mark.parametrize("form", ["alpaca", "prompt"])
def test_system_and_history_come_first_and_its_answers_are_learned(history: Any, form: str) -> None:
    last = {"instruction": "add", "output": "3"} if form == "alpaca" else {"prompt": "add", "completion": "3"}
    result, learned, whole = coded(last | {"system": "be a pirate", "history": history})
    assert whole == f"<|system|>be a pirate{END}<|user|>hi{END}<|assistant|>arr{END}<|user|>add{END}<|assistant|>3{END}"
    assert learned == [f"arr{END}", f"3{END}"]
    assert result.unused == ()


def test_a_system_column_stands_behind_the_conversations_own() -> None:
    fields = {"messages": [user("a"), assistant("b")], "system": "be kind"}
    result, learned, whole = coded(fields)
    assert whole.startswith(f"<|system|>be kind{END}<|user|>a")
    assert (learned, result.unused) == ([f"b{END}"], ())
    own = {"role": "system", "content": "be brief"}
    result, _, whole = coded(fields | {"messages": [own, *fields["messages"]]})
    assert "be kind" not in whole
    assert result.unused == ("a column 'system'",)
    _, learned, _ = coded({"prompt": [user("a")], "completion": [assistant("b")], "system": "be kind"})
    assert learned == [f"b{END}"]


def test_alpaca_rows_without_a_template_have_system_and_history_in_their_own_words() -> None:
    fields = {"instruction": "add", "input": "1", "output": "3", "system": "be kind", "history": [["hi", "arr"]]}
    tokenizer = tiny_tokenizer(chat=False)
    result = encode(Row(source="a", fields=fields), tokenizer, DataConfig(seq=10**6))
    assert tokenizer.decode(result.input_ids) == (
        f"be kind\n\n### Instruction:\nhi\n\n### Response:\narr{END}\n\n"
        f"### Instruction:\nadd\n\n### Input:\n1\n\n### Response:\n3{END}"
    )
    assert tokenizer.decode(result.labels[result.labels != IGNORED]) == f"arr{END}3{END}"
    plain = {"prompt": "a", "completion": "b", "system": "be kind", "history": [["hi", "arr"]], "tools": [TOOL]}
    result = encode(Row(source="a", fields=plain), tokenizer, DataConfig(seq=10**6))
    assert set(result.unused) == {"a column 'system'", "a column 'history'", "a column 'tools'"}


@pytest.mark.parametrize("history", [["a", "b"], [["a"]], "text", [[1, 2]]])
def test_a_history_that_is_none_is_refused(history: Any) -> None:
    with pytest.raises(BadRowError, match=r"history is not a list of \[question, answer\] pairs"):
        coded({"instruction": "a", "output": "b", "history": history})


def test_a_rows_own_template_variables_are_used() -> None:
    template = "{% if mood %}<{{ mood }}>{% endif %}" + PLAIN
    row = {"messages": [user("a"), assistant("b")]}
    for variables in ({"mood": "glad"}, '{"mood": "glad"}'):
        result, _, whole = coded(row | {"chat_template_kwargs": variables}, template)
        assert whole.startswith("<glad>")
        assert result.unused == ()
    assert coded(row | {"chat_template_kwargs": {"mood": "glad"}})[0].unused == ("a column 'chat_template_kwargs'",)
    for variables, said in (({"tokenize": True}, "sets tokenize"), ([1], "is a list, not a mapping")):
        with pytest.raises(BadRowError, match=said):
            coded(row | {"chat_template_kwargs": variables}, template)


def test_messages_may_be_json_text_and_contents_text_parts() -> None:
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    messages = [user("a"), assistant("x") | {"content": parts}]
    assert coded({"messages": json.dumps(messages)})[1] == [f"hello{END}"]
    picture = [{"type": "image", "url": "a.png"}]
    with pytest.raises(BadRowError, match="a list with a part that is not text"):
        coded({"messages": [user("a") | {"content": picture}, assistant("b")]})
    assert coded({"prompt": [user("a")], "completion": "b"})[1] == [f"b{END}"]


# What the text leaves out.


def test_columns_and_keys_that_are_left_out_are_named() -> None:
    messages = [user("a") | {"name": "Ann", "weight": 1}, assistant("b", reasoning_content="so", audio=None)]
    fields = {"messages": messages, "score": 0, "id": "", "nothing": None, "nan": float("nan"), "tools": [TOOL]}
    result, _, _ = coded(fields)
    assert set(result.unused) == {
        "a column 'score'",
        "a column 'tools'",
        "a message key 'name'",
        "a message key 'reasoning_content'",
        "a weight on a message that is no answer",
    }
    seen = PLAIN.replace("{{ m['content'] }}", "{{ m.name or '' }}{{ m.reasoning_content or '' }}{{ m.content }}")
    assert "a message key 'name'" not in coded(fields, seen)[0].unused
    assert "a message key 'reasoning_content'" not in coded(fields, seen)[0].unused


def test_a_content_that_the_template_drops_beside_tool_calls_is_named() -> None:
    either = TOOLS_TEMPLATE.replace("{{ m.content or '' }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}")
    messages = [user("a"), assistant("look", tool_calls=[call({"a": 1})])]
    assert coded({"messages": messages}, either)[0].unused == ("a content beside tool_calls",)
    assert coded({"messages": messages}, TOOLS_TEMPLATE)[0].unused == ()


# Answers that end themselves.


@pytest.mark.parametrize("written", [END, f"{END}\n", f" {END}", END + END])
@pytest.mark.parametrize("tail", ["", "\n"])
def test_an_answer_that_ends_itself_is_not_ended_twice(written: str, tail: str) -> None:
    template = PLAIN.replace("{{ m['content'] }}<|end|>", "{{ m['content'] }}<|end|>" + tail)
    for fields in (
        {"prompt": "a", "completion": f"b{written}"},
        {"messages": [user("a"), assistant(f"b{written}"), user("c")]},
        {"messages": [user("a"), assistant(f"b{written}"), user("c"), assistant(f"d{written}")]},
    ):
        for text in coded(fields, template)[1]:
            assert text.count(END) == 1
            assert text.endswith(END + tail)


def test_an_end_that_the_template_does_not_write_stays() -> None:
    bare = PLAIN.replace("{{ m['content'] }}<|end|>", "{{ m['content'] }}")
    assert coded({"prompt": "a", "completion": f"b{END}"}, bare)[1] == [f"b{END}"]


@pytest.mark.parametrize("written", [END, f"{END}\n", f" {END}"])
def test_without_a_template_an_answer_that_ends_itself_is_not_ended_twice(written: str) -> None:
    tokenizer = tiny_tokenizer(chat=False)
    for fields in ({"prompt": "a", "completion": f"b{written}"}, {"text": f"ab{written}"}):
        result = encode(Row(source="a", fields=fields), tokenizer, DataConfig(seq=100))
        assert result.input_ids.tolist().count(tokenizer.eos_token_id) == 1
        assert result.input_ids[-1] == tokenizer.eos_token_id
    with pytest.raises(BadRowError, match="is empty but for its end"):
        coded({"prompt": "a", "completion": END})
