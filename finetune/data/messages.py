"""Checks the messages of a conversation, and converts them into the form that chat templates take.

The columns and keys have the meaning that other tools give them. ``tools`` and ``chat_template_kwargs`` are those of
TRL, a message's ``weight`` is that of OpenAI's and Mistral's fine-tuning formats, and ``tool_calls`` are those of
transformers. ``from`` and ``value`` are those of ShareGPT, with the names that LLaMA-Factory and axolotl know.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from typing import TYPE_CHECKING, Any

from finetune.data.formats import kind, shown
from finetune.data.rows import BadRowError
from finetune.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""The role that each name in a ``from`` stands for."""
_OTHER_ROLES = {"model": "assistant", "ai": "assistant", "bot": "assistant", "instruction": "user", "prompter": "user"}
_TEMPLATE_ARGUMENTS = ("add_generation_prompt", "conversation", "messages", "return_dict", "tokenize", "tools")
"""Names that ``chat_template_kwargs`` may not set, because finetune passes them to the template itself."""


@contextlib.contextmanager
def blamed_on_the_row(what: str) -> Iterator[None]:
    """Turn any error that a template or a tokenizer raises for a row into a `BadRowError` that begins with ``what``.

    A template that Jinja cannot compile fails for every row, and that is no fault of the row.

    A panic in the Rust code of tokenizers is not an ``Exception`` in Python, so it is recognised by the name of its
    class. A ``MemoryError`` and a signal such as Ctrl-C are not caused by the row, and are not caught.

    Raises:
        BadRowError: the row cannot be rendered or tokenized.
        ModelError: the chat template is not one.
    """
    try:
        yield
    except (BadRowError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = str(error).strip().splitlines() or [""]
        if "TemplateSyntaxError" in (parent.__name__ for parent in type(error).__mro__):  # jinja2's
            raise ModelError(
                f"the model's chat template is broken in line {getattr(error, 'lineno', '?')}: {said[0].rstrip('.')}. "
                "Mend chat_template.jinja in the model's folder, or chat_template in its tokenizer_config.json"
            ) from None
        kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
        raise BadRowError(f"{what}: {kind}{said[0]}") from None


def read_messages(value: Any, column: str) -> list[dict[str, Any]]:
    """Check the messages of a row, and return a copy in the form that templates take.

    Messages of ShareGPT, with ``from`` and ``value``, get a role and a content, and the call in a ``function_call``
    becomes ``tool_calls``. A content that is a list of text parts becomes one text. An assistant message that has other
    keys and no content gets an empty one. Arguments of tool calls that are JSON text of an object become that object.

    Args:
        value: a list of messages, or JSON text of one, as a CSV file holds it.
        column: name of their column, for error messages.

    Raises:
        BadRowError: the value is not a list of messages; the error gives the number of the first one that is wrong.
    """
    value = parsed_json(value, list)
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{column} is {'an empty list' if value == [] else kind(value)}, not messages")
    return [_message(message, f"message {number} of {column}") for number, message in enumerate(value, start=1)]


def read_tools(value: Any) -> list[Any] | None:
    """Return the tools of a row, given as a list or as JSON text of one; None if it has none.

    Raises:
        BadRowError: the value is neither.
    """
    found = parsed_json(value, list)
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise BadRowError("tools is not a list of JSON schemas, nor JSON text of one")
    return found


def read_template_settings(value: Any) -> dict[str, Any]:
    """Return the row's variables for the chat template, given as a mapping or as JSON text of one.

    Raises:
        BadRowError: the value is neither, or sets a variable that finetune sets itself.
    """
    found = parsed_json(value, dict) or {}
    if not isinstance(found, dict):
        raise BadRowError(f"chat_template_kwargs is {kind(found)}, not a mapping of name to value")
    taken = [name for name in _TEMPLATE_ARGUMENTS if name in found]
    if taken:
        raise BadRowError(f"chat_template_kwargs sets {', '.join(taken)}, which a row cannot set there")
    return {name: value for name, value in found.items() if value is not None}


def is_withheld(message: dict[str, Any]) -> bool:
    """Return whether an answer has ``weight: 0``. Such an answer stays in the conversation, and is not trained on."""
    return message["role"] == "assistant" and message.get("weight") == 0


def for_template(messages: Sequence[dict[str, Any]], *, without: str | None = None) -> list[dict[str, Any]]:
    """Return the messages in the form that is passed to a template, without their weights.

    Args:
        messages: as `read_messages` returns them.
        without: a key to leave out, to see whether the template uses it. ``content`` becomes the empty text, and only
            in messages that have tool calls.
    """
    left_out = {"weight", without} - {"content"}
    shown = [{key: value for key, value in message.items() if key not in left_out} for message in messages]
    for message in shown if without == "content" else ():
        if message.get("tool_calls"):
            message["content"] = ""
    return shown


def with_written_arguments(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the arguments of tool calls as JSON text, for templates that insert them unchanged."""
    return [
        message | {"tool_calls": [_with_arguments(call, _as_text) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def arguments_of(messages: Sequence[dict[str, Any]]) -> list[Any]:
    """Return the arguments of every tool call in a conversation."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    holders = [_holder(call) for call in calls if isinstance(call, dict)]
    return [holder["arguments"] for holder in holders if "arguments" in holder]


def _message(given: Any, where: str) -> dict[str, Any]:
    if isinstance(given, dict) and given.get("role") is None and given.get("from") is not None:
        given = _from_sharegpt(given, where)
    if not isinstance(given, dict) or given.get("role") is None:
        raise BadRowError(f"{where} needs a role and a content, or a from and a value")
    message = {key: value for key, value in given.items() if value is not None}
    role = message["role"]
    if role not in ROLES:
        spelled = str(role).lower()
        near = difflib.get_close_matches(spelled, ROLES, n=1)
        meant = SHAREGPT_ROLES.get(spelled) or _OTHER_ROLES.get(spelled) or (near[0] if near else None)
        guess = f" (did you mean {meant}?)" if meant else ""
        raise BadRowError(f"{where} has the role {role!r}{guess}; roles are {', '.join(ROLES)}")
    if message.get("weight", 1) not in (0, 1):
        raise BadRowError(f"the weight of {where} is {message['weight']!r}; it is 0 (not trained on) or 1")
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    others = {key for key, value in message.items() if key not in ("role", "content", "weight") and value}
    if role == "assistant" and others:
        message.setdefault("content", "")
    if "content" not in message:
        raise BadRowError(f"{where} needs a role and a content, or a from and a value")
    message["content"] = _content(message["content"], where)
    if role == "assistant" and not message["content"].strip() and not others and not is_withheld(message):
        raise BadRowError(f"the content of {where}, an answer, is empty")
    return message


def _from_sharegpt(given: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a ShareGPT message with ``role`` and ``content`` in place of ``from`` and ``value``."""
    name = given["from"]
    if not isinstance(name, str) or name not in SHAREGPT_ROLES:
        raise BadRowError(f"{where} is from {name!r}; it may be from {', '.join(SHAREGPT_ROLES)}")
    others = {key: value for key, value in given.items() if key not in ("from", "value", "role") and value is not None}
    if name != "function_call":
        return {"content": given.get("value")} | others | {"role": SHAREGPT_ROLES[name]}
    found = given.get("value")
    found = parsed_json(parsed_json(found, dict), list)
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise BadRowError(f"the value of {where}, a function_call, is not a call with a name, nor a list of calls")
    tool_calls = [{"type": "function", "function": call} for call in calls]
    return others | {"role": "assistant", "tool_calls": tool_calls}


def _content(value: Any, where: str) -> str:
    """Return the text of a message whose content is text, or a list of text parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in value]
        other = next((part for part, text in zip(value, texts, strict=True) if not isinstance(text, str)), None)
        if other is None and None not in value:
            return "".join(str(text) for text in texts)
        raise BadRowError(
            f"the content of {where} is a list with a part that is not text: {shown(str(other))}; only text is trained "
            "on, given as text or as {'type': 'text', 'text': ...}"
        )
    raise BadRowError(f"the content of {where} is {kind(value)}, not text; write it as text")


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    calls = parsed_json(value, list)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRowError(f"the tool_calls of {where} are not a list of calls")
    return [_with_arguments(call, _as_object) for call in calls]


def _holder(call: dict[str, Any]) -> dict[str, Any]:
    """Return the mapping that holds the name and arguments of a call: its ``function``, or the call itself."""
    function = call.get("function")
    return function if isinstance(function, dict) else call


def _with_arguments(call: dict[str, Any], change: Any) -> dict[str, Any]:
    holder = _holder(call)
    if "arguments" not in holder:
        return call
    changed = holder | {"arguments": change(holder["arguments"])}
    return changed if holder is call else call | {"function": changed}


def _as_object(arguments: Any) -> Any:
    """Return the object that JSON text holds, an empty object for empty text, and any other value unchanged."""
    if isinstance(arguments, str) and not arguments.strip():
        return {}
    return parsed_json(arguments, dict)


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def parsed_json(value: Any, kind: type) -> Any:
    """Return the value that JSON text holds if its type is ``kind``; any other value is returned unchanged."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, kind) else value
