"""A conversation as text: the model's chat template, and where in its text the answers lie.

An answer is found by its position in the rendered text, never by a mark or a token's value: few templates mark what the
assistant says, and with many models the padding token is also the one that ends an answer.
"""

from __future__ import annotations

import json
import os.path
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.data.messages import arguments_of, blamed_on_the_row, for_template, is_withheld, with_written_arguments
from finetune.data.rows import BadRowError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ASKED = {"role": "user", "content": "?"}
"""Stands before an answer that nothing was asked before, to see where the template's prompt for it ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch of a row's text, and whether the model is to learn to write it."""

    text: str
    learned: bool
    withheld: bool = False
    """The row says that it is not trained on (``weight: 0``), whatever the settings say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What a row hands to a chat template."""

    messages: list[dict[str, Any]]
    """From :func:`finetune.data.messages.read_messages`."""
    learn_from: int = 0
    """The first message whose answer is trained on; those before it are a prompt."""
    tools: list[Any] | None = None
    settings: Mapping[str, Any]
    """The row's own variables for the template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Renderer:
    """A template with the tools and settings of one row."""

    tokenizer: Any
    tools: list[Any] | None
    settings: Mapping[str, Any]

    def __call__(self, messages: Sequence[dict[str, Any]], *, ask: bool = False, without: str | None = None) -> str:
        """The text of the messages, with the prompt for an answer behind it if ``ask``.

        Raises:
            BadRowError: the template raised something.
        """
        with blamed_on_the_row("the chat template refuses it"):
            text: Any = self.tokenizer.apply_chat_template(
                for_template(messages, without=without),
                tools=self.tools,
                tokenize=False,
                add_generation_prompt=ask,
                **self.settings,
            )
            return str(text)

    def differs(self, messages: Sequence[dict[str, Any]], whole: str, *, without: str | None = None) -> bool:
        """Whether the text of the messages is another than ``whole``, or cannot be rendered."""
        try:
            return self(messages, without=without) != whole
        except BadRowError:
            return True


def conversation_parts(
    conversation: Conversation, tokenizer: Any, *, train_on_prompt: bool
) -> tuple[list[Part], list[str]]:
    """Cut the rendered conversation where the assistant's turns begin and end.

    A turn begins where the prompt for it would end, so that what is learned is what the model is asked to write. (Where
    the template's prompt opens with something that the recorded answer lacks, a thought, it begins where they part.)

    Args:
        conversation: the row.
        tokenizer: has the template.
        train_on_prompt: withheld turns must be found too, since everything else is learned.

    Returns:
        The parts, whose texts joined are the rendered conversation; and what the row has and the template leaves out.

    Raises:
        BadRowError: the template refuses the conversation, or an answer has no fixed place in it.
    """
    if not tokenizer.chat_template:
        raise BadRowError("messages need a chat template, and the tokenizer has none; use prompt + completion rows")
    render = _Renderer(tokenizer=tokenizer, tools=conversation.tools, settings=conversation.settings)
    messages = _with_arguments_as_taken(conversation.messages, render)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [i for i in answers if i >= conversation.learn_from and not is_withheld(messages[i])]
    if not learned:
        raise BadRowError("there is no assistant turn to learn from")
    withheld = [i for i in answers if train_on_prompt and is_withheld(messages[i])]
    turns = sorted([*learned, *withheld])
    while True:
        parts = _cut(messages, turns, render)
        doubled = _without_own_end(messages, dict(zip(turns, parts[1::2], strict=True)), tokenizer)
        if doubled is None:
            break
        messages = doubled
    return parts, _left_out(messages, learned, "".join(part.text for part in parts), render)


def _with_arguments_as_taken(messages: list[dict[str, Any]], render: _Renderer) -> list[dict[str, Any]]:
    """The messages with tool calls' arguments as objects, or as JSON text where the template cannot take objects.

    A template that cannot raises, or writes an object as Python would print it.
    """
    objects = [value for value in arguments_of(messages) if isinstance(value, dict)]
    if not objects:
        return messages
    written = with_written_arguments(messages)
    try:
        text = render(messages)
    except BadRowError:
        return written if _renders(written, render) else messages
    printed = [value for value in objects if str(value) in text and str(value) != json.dumps(value)]
    return written if printed and _renders(written, render) else messages


def _renders(messages: list[dict[str, Any]], render: _Renderer) -> bool:
    try:
        render(messages)
    except BadRowError:
        return False
    return True


def _cut(messages: list[dict[str, Any]], turns: Sequence[int], render: _Renderer) -> list[Part]:
    """What lies before each of the turns and each turn itself, by turns, and the rest."""
    whole = render(messages)
    parts: list[Part] = []
    place = 0
    for turn in turns:
        answered = render(messages[: turn + 1])
        least, begin = _beginning(messages[: turn + 1], answered, render)
        if not (whole.startswith(answered) and begin >= max(place, least)):
            raise BadRowError(
                f"the chat template writes message {turn + 1} differently when others follow, so that an answer has no "
                "fixed place; give the last answer alone, as prompt + completion"
            )
        withheld = is_withheld(messages[turn])
        parts.append(Part(text=whole[place:begin], learned=False))
        parts.append(Part(text=whole[begin : len(answered)], learned=not withheld, withheld=withheld))
        place = len(answered)
    return [*parts, Part(text=whole[place:], learned=False)]


def _beginning(messages: list[dict[str, Any]], answered: str, render: _Renderer) -> tuple[int, int]:
    """Where the last message, an answer, begins in the text of all of them.

    Returns:
        The least place where it may begin, for what is before it is not its own; and where it begins.
    """
    if len(messages) > 1:
        try:
            before = render(messages[:-1])
            prompt = render(messages[:-1], ask=True)
        except BadRowError:  # a template that wants a question first refuses what comes before a greeting
            return 0, _beginning_unasked(messages, answered, render)
        return len(before), _common(prompt, answered)
    return 0, _beginning_unasked(messages, answered, render)


def _beginning_unasked(messages: list[dict[str, Any]], answered: str, render: _Renderer) -> int:
    """Where an answer begins that no question comes before, such as a greeting.

    No template can be asked for the prompt of an empty conversation. So the same answer is rendered behind a question:
    what is learned of it there is learned here too, where the text ends with it. Where it does not, since a template
    writes the two differently, the answer begins behind the prompt's words (``<|im_start|>assistant``), which are
    looked for before its content; and with its content if the template's prompt has none.
    """
    *earlier, answer = messages
    words = ""
    try:
        asked = render([*earlier, _ASKED])
        prompt = render([*earlier, _ASKED], ask=True)
        words = prompt[_common(asked, prompt) :]
        after = render([*earlier, _ASKED, answer])
        learned = after[_common(prompt, after) :]
    except BadRowError:
        learned = ""
    if learned.strip() and answered.endswith(learned):
        return len(answered) - len(learned)
    other = {"role": "assistant", "content": "y" if answer["content"].lstrip().startswith("x") else "x"}
    try:
        content = _common(answered, render([*earlier, other]))
    except BadRowError:
        raise BadRowError(
            "the chat template writes no prompt for an answer that no question comes before; put a user message first"
        ) from None
    shared, place = max((_common(words, answered[place:]), place) for place in range(content + 1))
    return place + shared if shared else content


def _common(one: str, other: str) -> int:
    """Characters that both begin with."""
    return len(os.path.commonprefix([one, other]))  # noqa: RUF071  characters, not folders


def _without_own_end(
    messages: list[dict[str, Any]], turns: Mapping[int, Part], tokenizer: Any
) -> list[dict[str, Any]] | None:
    """The messages without the end that an answer has written itself, where the template writes one too.

    Returns:
        None where no answer has.
    """
    for turn, part in turns.items():
        content = messages[turn]["content"].rstrip()
        place = part.text.find(content) if content else -1
        behind = part.text[place + len(content) :] if place >= 0 else ""
        ends = [
            behind.strip(),
            *([tokenizer.eos_token] if tokenizer.eos_token and tokenizer.eos_token in behind else []),
        ]
        for end in ends:
            if end and content.endswith(end):
                shorter = content.removesuffix(end)
                if not shorter.strip() and not set(messages[turn]) - {"role", "content", "weight"}:
                    raise BadRowError(f"message {turn + 1}, an answer, is empty but for its end {end}")
                return [*messages[:turn], messages[turn] | {"content": shorter}, *messages[turn + 1 :]]
    return None


def _left_out(messages: list[dict[str, Any]], learned: Sequence[int], whole: str, render: _Renderer) -> list[str]:
    """What the row has and the text does not depend on: each is left out once, to see whether the text changes.

    Raises:
        BadRowError: the template leaves out all that there is of an answer.
    """
    found = [
        f"a message key {key!r}"
        for key in sorted({key for message in messages for key, value in message.items() if value})
        if key not in ("role", "content", "weight") and not render.differs(messages, whole, without=key)
    ]
    if any(message["role"] != "assistant" and message.get("weight") for message in messages):
        found.append("a weight on a message that is no answer")
    for turn in learned:
        lost = [key for key in messages[turn] if f"a message key {key!r}" in found]
        if not messages[turn]["content"].strip() and lost:
            raise BadRowError(
                f"message {turn + 1}, an answer, has no content, and the chat template leaves out its {', '.join(lost)}"
            )
    called = any(message.get("tool_calls") and message["content"].strip() for message in messages)
    if called and not render.differs(messages, whole, without="content"):
        found.append("a content beside tool_calls")
    if render.tools and not _with(render, tools=None).differs(messages, whole):
        found.append("a column 'tools'")
    if render.settings and not _with(render, settings={}).differs(messages, whole):
        found.append("a column 'chat_template_kwargs'")
    return found


def _with(render: _Renderer, **changes: Any) -> _Renderer:
    return _Renderer(**{"tokenizer": render.tokenizer, "tools": render.tools, "settings": render.settings} | changes)
