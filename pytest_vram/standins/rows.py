"""Make the longest rows of a data set: rows like its own, whose answer is as long as a program can use."""

from __future__ import annotations

import itertools
from typing import Any

Row = dict[str, Any]

MOST_ROWS = 256
"""The most rows that replace a data set: enough for a few steps, and few enough to be tokenized in a moment."""

_ANSWERS = (
    "text",
    "output",
    "response",
    "completion",
    "answer",
    "chosen",
    "rejected",
    "target",
    "label",
    "messages",
    "conversations",
    "conversation",
    "content",
    "value",
)
_SEVERAL = ("chosen", "rejected")


def longest(row: Row, words: int) -> tuple[Row, str]:
    """Return ``row`` with its answer made ``words`` words long, and the names of the columns that were lengthened.

    Only the answer grows, because programs that train on answers alone drop rows whose prompt fills the whole length.
    A column of token numbers (``input_ids``, ``labels``) gets that many numbers.

    Args:
        row: a row of any data set: texts, messages (the last one is lengthened), or numbers of tokens.
        words: the length. A tokenizer makes at least one token of a word.
    """
    tokens = [name for name, value in row.items() if _is_tokens(value)]
    if tokens:
        return {**row, **{name: _repeated(row[name], words) for name in tokens}}, ", ".join(tokens)
    names = _columns(row)
    return {**row, **{name: _lengthened(row[name], words) for name in names}}, ", ".join(names)


def _columns(row: Row) -> list[str]:
    """Return the columns with the answer: those with a usual name, otherwise the one with the longest text."""
    usable = {name: value for name, value in row.items() if _size(value) is not None}
    pairs = [name for name in _SEVERAL if name in usable]
    if pairs:
        return pairs
    for name in _ANSWERS:
        if name in usable:
            return [name]
    return [max(usable, key=lambda name: _size(usable[name]) or 0)] if usable else []


def _size(value: Any) -> int | None:
    """Return the number of characters of a text, or of the last message; None for other values."""
    if isinstance(value, str):
        return len(value)
    message = value[-1] if isinstance(value, list) and value else None
    name = _content(message)
    return None if name is None or not isinstance(message, dict) else len(message[name])


def _content(message: Any) -> str | None:
    """Return the name under which a message has its text: ``content``, or ``value`` as in ShareGPT's format."""
    if not isinstance(message, dict):
        return None
    return next((name for name in ("content", "value", "text") if isinstance(message.get(name), str)), None)


def _lengthened(value: Any, words: int) -> Any:
    if isinstance(value, str):
        return _text(value, words)
    name = _content(value[-1])
    return [*value[:-1], {**value[-1], name: _text(value[-1][name], words)}]


def _text(text: str, words: int) -> str:
    """Return ``words`` words: those of ``text`` over and over."""
    return " ".join(itertools.islice(itertools.cycle(text.split() or ["word"]), words))


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _repeated(numbers: list[int], count: int) -> list[int]:
    return list(itertools.islice(itertools.cycle(numbers), count))
