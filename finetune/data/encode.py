"""Turns one row into token ids and labels. By default only the tokens of the answer have a label.

Besides the columns that define a row's format (see `finetune.data.formats.FORMATS`), these are used:

* ``system``, ``tools`` and ``chat_template_kwargs``: with a chat template, in every format except ``text``;
* ``history``: in ``prompt`` + ``completion`` and alpaca rows. It is a list of [question, answer] pairs, as
  LLaMA-Factory defines it, and its answers are learned too.

The run names every other column that holds something, once.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.conversation import Conversation, Part, conversation_parts
from finetune.data.formats import FORMATS, holds, is_nothing, kind
from finetune.data.messages import blamed_on_the_row, parsed_json, read_messages, read_template_settings, read_tools
from finetune.data.rows import BadRowError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from finetune.config.settings import DataConfig
    from finetune.data.rows import Row

IGNORED = -100
"""Label of a token that the loss is not taken on, the default ``ignore_index`` of torch's cross-entropy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A row as tokens."""

    input_ids: NDArray[np.int32]
    """[tokens]"""
    labels: NDArray[np.int32]
    """[tokens]: the token's id if the loss is taken on it, else -100."""
    cut: int
    """Number of tokens beyond the longest sequence, which were cut off."""
    unused: tuple[str, ...] = ()
    """Columns and keys that hold something and are not used, in words, such as ``a column 'score'``."""


def encode(row: Row, tokenizer: Any, config: DataConfig) -> Encoded:
    """Turn a row into tokens.

    Args:
        row: the row as it was read, in any of `finetune.data.formats.FORMATS`.
        tokenizer: the tokenizer of the model.
        config: ``seq`` is the longest sequence in tokens; ``train_on_prompt`` takes the loss on the whole text.

    Raises:
        BadRowError: the row cannot be used; the message says why.
    """
    if row.problem:
        raise BadRowError(row.problem)
    parts, unused = _parts(row.fields, tokenizer, train_on_prompt=config.train_on_prompt)
    everything = config.train_on_prompt and not any(part.withheld for part in parts)
    if config.train_on_prompt:
        parts = [replace(part, learned=not part.withheld) for part in parts]
    ids, learned = tokenize(parts, tokenizer)
    labels = ids if everything else np.where(learned, ids, IGNORED).astype(np.int32)
    cut = max(0, len(ids) - config.seq)
    return Encoded(input_ids=ids[: config.seq], labels=labels[: config.seq], cut=cut, unused=tuple(unused))


def targets(labels: NDArray[np.int32]) -> int:
    """Count the tokens that the loss is taken on: those with a label, except the first, which no token predicts."""
    return int((labels[1:] != IGNORED).sum())


def tokenize(parts: Sequence[Part], tokenizer: Any) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Tokenize the joined text of the parts, and find the tokens that the model learns: those that touch a learned one.

    The parts are joined first, because some tokenizers (SentencePiece's, for one) put a space before every text that
    they get. A tokenizer that does not report the position of its tokens gets the parts one by one instead.

    Returns:
        The token ids, int32 [tokens]; and whether each is learned, bool [tokens].

    Raises:
        BadRowError: the tokenizer refuses the text, or the text has a lone surrogate, half of a character.
    """
    text = "".join(part.text for part in parts)
    _require_whole_characters(text)
    with blamed_on_the_row("the tokenizer refuses its text"):
        return _tokenized(parts, text, tokenizer)


def _tokenized(parts: Sequence[Part], text: str, tokenizer: Any) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    if not getattr(tokenizer, "is_fast", False):
        pieces = [tokenizer(part.text, add_special_tokens=False)["input_ids"] for part in parts]
        flags = [np.full(len(piece), part.learned) for piece, part in zip(pieces, parts, strict=True)]
        return np.concatenate([np.asarray(piece, np.int32) for piece in pieces]), np.concatenate(flags)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(coded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    learned_up_to = np.zeros(len(text) + 1, dtype=np.int64)  # the number of learned characters before each position
    place = 0
    for part in parts:
        steps = np.arange(1, len(part.text) + 1) * int(part.learned)
        learned_up_to[place + 1 : place + 1 + len(part.text)] = learned_up_to[place] + steps
        place += len(part.text)
    # A token without characters (a lone space marker) is learned if the character after it is.
    ends = np.maximum(offsets[:, 1], np.minimum(offsets[:, 0] + 1, len(text)))
    return np.asarray(coded["input_ids"], np.int32), learned_up_to[ends] > learned_up_to[offsets[:, 0]]


def _require_whole_characters(text: str) -> None:
    """Refuse a lone surrogate. JSON can write one as an escape, but no encoding of text can hold it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise BadRowError(
            f"its text holds half of a character, {half} (a lone surrogate), as when an emoji was cut in the middle; "
            "remove it or write the whole character"
        ) from None


def _parts(fields: Any, tokenizer: Any, *, train_on_prompt: bool) -> tuple[list[Part], list[str]]:
    """Return the text of a row in parts and, in words, the columns and keys that the text leaves out."""
    if not isinstance(fields, dict):
        raise BadRowError(f"the row is {kind(fields)}, not a mapping of column to value")
    form = _format_of(fields)
    used = set(FORMATS[form])
    if form == "text":
        return _plain_text(fields, tokenizer), _unused_columns(fields, used)
    if form in ("messages", "conversations"):
        messages, learn_from = read_messages(fields[form], form), 0
    elif form == "prompt/completion" and isinstance(fields["prompt"], list):
        prompt = read_messages(fields["prompt"], "prompt")
        messages, learn_from = prompt + _completion(fields["completion"]), len(prompt)
    else:
        used |= {"history"} | ({"input"} if form == "alpaca" else set())
        turns = _turns(fields, form)
        if not tokenizer.chat_template:
            parts, used_here = _without_template(fields, form, turns, tokenizer)
            return parts, _unused_columns(fields, (used - {"history"}) | used_here)
        messages, learn_from = [message for turn in turns for message in _question_and_answer(*turn)], 0
    system = _optional_text(fields, "system")
    if system and messages[0]["role"] not in ("system", "developer"):
        messages, learn_from = [{"role": "system", "content": system}, *messages], learn_from + bool(learn_from)
        used.add("system")
    conversation = Conversation(
        messages=messages,
        learn_from=learn_from,
        tools=read_tools(fields.get("tools")),
        settings=read_template_settings(fields.get("chat_template_kwargs")),
    )
    used |= {"tools", "chat_template_kwargs"}
    parts, unused = conversation_parts(conversation, tokenizer, train_on_prompt=train_on_prompt)
    return parts, unused + _unused_columns(fields, used)


def _unused_columns(fields: Mapping[str, Any], used: set[str]) -> list[str]:
    """Return the columns that hold something and are not used, in words."""
    return [f"a column {str(name)!r}" for name, value in fields.items() if name not in used and holds(value)]


def _format_of(fields: Mapping[str, Any]) -> str:
    """Return the first format whose columns all hold something; without one, the first whose columns are there."""
    for there in (holds, lambda value: not is_nothing(value)):
        for name, columns in FORMATS.items():
            if all(there(fields.get(column)) for column in columns):
                return name
    wanted = sorted({column for columns in FORMATS.values() for column in columns})
    told = []
    for column, value in fields.items():
        near = difflib.get_close_matches(str(column), wanted, n=1)
        guess = f" (did you mean {near[0]}?)" if near and column not in wanted else ""
        told.append(f"{column}{guess}{' (which holds nothing)' if is_nothing(value) else ''}")
    formats = "; or ".join(" + ".join(columns) for columns in FORMATS.values())
    raise BadRowError(f"its columns are {', '.join(told) or 'none'}; a row needs {formats}")


def _text(fields: Mapping[str, Any], column: str) -> str:
    value = fields[column]
    if not isinstance(value, str):
        raise BadRowError(f"{column} is {kind(value)}, not text; write it as text")
    if not value.strip():
        raise BadRowError(f"{column} is empty")
    return value


def _optional_text(fields: Mapping[str, Any], column: str) -> str:
    """Return the text of a column; the empty text if the column is missing or holds nothing."""
    value = fields.get(column)
    if not holds(value):
        return ""
    if not isinstance(value, str):
        raise BadRowError(f"{column} is {kind(value)}, not text; write it as text")
    return value if value.strip() else ""


def _completion(value: Any) -> list[dict[str, Any]]:
    """Return the answer to a prompt of messages, given as messages or as the text of one."""
    if isinstance(value, str) and value.strip():
        return [{"role": "assistant", "content": value}]
    return read_messages(value, "completion")


def _turns(fields: Mapping[str, Any], form: str) -> list[tuple[str, str]]:
    """Return the questions and answers of a prompt + completion or an alpaca row, those of its history first."""
    if form == "alpaca":
        asked, answer = _text(fields, "instruction"), _text(fields, "output")
        given = _optional_text(fields, "input")
        asked = f"{asked}\n\n{given}" if given else asked
    else:
        asked, answer = _text(fields, "prompt"), _text(fields, "completion")
    history = fields.get("history")
    if not holds(history):
        return [(asked, answer)]
    earlier = parsed_json(history, list)
    if not isinstance(earlier, list) or not all(_is_pair(pair) for pair in earlier):
        raise BadRowError("history is not a list of [question, answer] pairs of text")
    return [*((str(question), str(reply)) for question, reply in earlier), (asked, answer)]


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _question_and_answer(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _plain_text(fields: Mapping[str, Any], tokenizer: Any) -> list[Part]:
    text = _text(fields, "text")
    start = tokenizer.bos_token if _adds_bos(tokenizer) and not text.startswith(tokenizer.bos_token) else ""
    return [Part(text=start, learned=False), Part(text=_ended(text, tokenizer), learned=True)]


def _without_template(
    fields: Mapping[str, Any], form: str, turns: list[tuple[str, str]], tokenizer: Any
) -> tuple[list[Part], set[str]]:
    """Return the text of a row when the tokenizer has no chat template, and the optional columns that are in the text.

    Alpaca rows have their own wording (https://github.com/tatsu-lab/stanford_alpaca). Like LLaMA-Factory, it gets the
    system text before the first turn, and a blank line between turns. A prompt and its completion are joined
    unchanged, without ``system`` and ``history``, because no convention says how to write those.
    """
    parts = [Part(text=tokenizer.bos_token if _adds_bos(tokenizer) else "", learned=False)]
    if form != "alpaca":
        prompt, completion = turns[-1]
        parts.append(Part(text=prompt, learned=False))
        return [*parts, Part(text=_ended(completion, tokenizer), learned=True)], set()
    system, given = _optional_text(fields, "system"), _optional_text(fields, "input")
    if system:
        parts.append(Part(text=f"{system}\n\n", learned=False))
    for number, (question, answer) in enumerate(turns, start=1):
        last = number == len(turns)
        asked = fields["instruction"] if last else question
        context = f"\n\n### Input:\n{given}" if last and given else ""
        parts.append(Part(text=f"### Instruction:\n{asked}{context}\n\n### Response:\n", learned=False))
        parts.append(Part(text=_ended(answer, tokenizer), learned=True))
        if not last:
            parts.append(Part(text="\n\n", learned=False))
    return parts, {"history", "system"}


def _ended(text: str, tokenizer: Any) -> str:
    """Append the end-of-sequence token to the text, unless the text ends with that token already."""
    ending = tokenizer.eos_token or ""
    if ending and text.rstrip().endswith(ending):
        ids, _ = tokenize([Part(text=text, learned=True)], tokenizer)
        if len(ids) and ids[-1] == tokenizer.eos_token_id:
            return text
        trimmed = text.rstrip()
        ids, _ = tokenize([Part(text=trimmed, learned=True)], tokenizer)
        if len(ids) and ids[-1] == tokenizer.eos_token_id:
            return trimmed
    return text + ending


def told_of_no_end(tokenizer: Any) -> str | None:
    """Return a note for a tokenizer that gives texts no end; None if it has an end token or a chat template."""
    if tokenizer.eos_token or tokenizer.chat_template:
        return None
    return (
        "the tokenizer has no end-of-sequence token and no chat template: the model does not learn where an answer "
        "ends. Set eos_token in tokenizer_config.json"
    )


def _adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer puts its BOS token before a text. Chat templates write the token themselves."""
    if tokenizer.bos_token is None:
        return False
    return list(tokenizer("a")["input_ids"][:1]) == [tokenizer.bos_token_id]
