"""Renders a conversation with the model's chat template, and finds where the answers begin and end in that text.

An answer is found by comparing rendered texts, never by a marker or by the value of a token: few templates mark the
text of the assistant, and with many models the padding token is also the token that ends an answer.
"""

from __future__ import annotations

import json
import os.path
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.data.messages import arguments_of, blamed_on_the_row, for_template, is_withheld, with_written_arguments
from finetune.data.rows import BadRowError
from finetune.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ASKED = {"role": "user", "content": "?"}
"""A question put before an answer that has none, to see where the template's prompt for the answer ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a row's text, and whether the model learns to write it."""

    text: str
    learned: bool
    withheld: bool = False
    """Whether the row excludes this piece from training (``weight: 0``), which no setting overrides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The messages and variables of a row, as its chat template takes them."""

    messages: list[dict[str, Any]]
    """As :func:`finetune.data.messages.read_messages` returns them."""
    learn_from: int = 0
    """Number of the first message that may be trained on; the messages before it are the prompt."""
    tools: list[Any] | None = None
    settings: Mapping[str, Any]
    """The row's ``chat_template_kwargs``: variables for the template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Renderer:
    """The chat template, together with the tools and variables of one row."""

    tokenizer: Any
    tools: list[Any] | None
    settings: Mapping[str, Any]

    def __call__(self, messages: Sequence[dict[str, Any]], *, ask: bool = False, without: str | None = None) -> str:
        """Render the messages as text.

        Args:
            messages: the messages.
            ask: append the template's prompt for an answer.
            without: a message key to leave out, see `for_template`.

        Raises:
            BadRowError: the template raised an error.
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
        """Return whether the messages render to another text than ``whole``, or cannot be rendered."""
        try:
            return self(messages, without=without) != whole
        except BadRowError:
            return True


def conversation_parts(
    conversation: Conversation, tokenizer: Any, *, train_on_prompt: bool
) -> tuple[list[Part], list[str]]:
    """Cut the rendered conversation where the assistant's turns begin and end.

    A turn begins where the template's prompt for it ends, so the model learns exactly the text that it will be asked to
    write. Some prompts contain text that the recorded answer lacks, such as the start of a thought. The turn then
    begins at the first character in which prompt and recorded text differ.

    Args:
        conversation: the row.
        tokenizer: has the template.
        train_on_prompt: find the withheld turns as well, because all other text is learned.

    Returns:
        The parts, whose texts joined are the rendered conversation; and, in words, what the row holds and the template
        leaves out.

    Raises:
        BadRowError: the template refuses the conversation, or renders an answer differently when messages follow it.
        ModelError: the tokenizer's chat template is broken, or it has several and none is the one for this row.
    """
    if not tokenizer.chat_template:
        raise BadRowError("messages need a chat template, and the tokenizer has none; use prompt + completion rows")
    _require_one_template(tokenizer.chat_template, tools=bool(conversation.tools))
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
    """Return the messages with the arguments of tool calls in the form that the template takes: objects, or JSON text.

    A template that takes JSON text only raises an error for an object, or writes it as Python's ``str`` does.
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
    """Cut the rendered text into parts: the text before a turn and the turn, for each of the turns, and the rest."""
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
    """Find where the last message, an answer, begins in the rendered text.

    Args:
        messages: the conversation up to the answer.
        answered: the rendered text of ``messages``.
        render: the template.

    Returns:
        The length of the text of the earlier messages, before which the answer cannot begin; and the position at which
        it does begin.
    """
    if len(messages) > 1:
        try:
            before = render(messages[:-1])
            prompt = render(messages[:-1], ask=True)
        except BadRowError:  # some templates need a question first, and refuse the messages before a greeting
            return 0, _beginning_unasked(messages, answered, render)
        return len(before), _common(prompt, answered)
    return 0, _beginning_unasked(messages, answered, render)


def _beginning_unasked(messages: list[dict[str, Any]], answered: str, render: _Renderer) -> int:
    """Find where an answer begins if no question comes before it, as with a greeting.

    No template renders the prompt of an empty conversation. So the same answer is rendered after a question:

    * If the text without the question ends with the part that is learned there, that part is the answer.
    * Otherwise the template writes an answer differently when no question comes before it. The words of the prompt
      (``<|im_start|>assistant``) are looked for before the content, and the answer begins after them.
    * If the template's prompt has no words, the answer begins with its content.
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
    """Return the number of characters with which both texts begin."""
    return len(os.path.commonprefix([one, other]))  # noqa: RUF071 - characters, not folders


def _without_own_end(
    messages: list[dict[str, Any]], turns: Mapping[int, Part], tokenizer: Any
) -> list[dict[str, Any]] | None:
    """Remove an end marker from the content of an answer if the template appends the same marker.

    Args:
        messages: the conversation.
        turns: the rendered part of each answer, by the answer's number.
        tokenizer: has the end-of-sequence token, one of the markers that are looked for.

    Returns:
        The messages, with one marker removed; None if no answer has one.

    Raises:
        BadRowError: an answer consists of the marker alone.
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


def _require_one_template(template: Any, *, tools: bool) -> None:
    """Refuse several named templates of which transformers would choose none: it takes "tool_use" for rows with tools.

    Raises:
        ModelError: there is no "default" among them.
    """
    if isinstance(template, dict) and "default" not in template and not (tools and "tool_use" in template):
        raise ModelError(
            f"the tokenizer has several chat templates ({', '.join(template)}), and none is named default. Save the "
            "one to train with as chat_template.jinja in the model's folder, and remove the others"
        )


def _left_out(messages: list[dict[str, Any]], learned: Sequence[int], whole: str, render: _Renderer) -> list[str]:
    """List, in words, what the row holds and the template does not use.

    Each key and column is left out once. If the text stays the same, the template does not use it.

    Raises:
        BadRowError: an answer has no content, and the template leaves out its other keys.
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
