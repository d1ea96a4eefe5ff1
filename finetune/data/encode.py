"""One row to token ids and labels: the model's chat template, and the loss on the answer only.

The answer is found by its position in the rendered text, never by a token's value: with many models the padding token
is also the one that ends an answer.
"""

from __future__ import annotations

import difflib
import os.path
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from finetune.config.settings import DataConfig
    from finetune.data.rows import Row

IGNORED = -100
"""Label of a token that the loss is not taken on, as torch's cross-entropy has it."""
FORMATS = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""Row formats by the columns that tell them, in the order in which they are looked for."""
ROLES = ("system", "user", "assistant", "tool", "developer")


class BadRowError(ValueError):
    """A row cannot be used; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch of a row's text, and whether the model is to learn to write it."""

    text: str
    learned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A row as tokens."""

    input_ids: NDArray[np.int32]
    """[tokens]"""
    labels: NDArray[np.int32]
    """[tokens]: the token itself where the loss is taken on it, else -100."""
    cut: int
    """Tokens beyond the longest sequence, which were cut off."""


def encode(row: Row, tokenizer: Any, config: DataConfig) -> Encoded:
    """Turn a row into tokens.

    Args:
        row: as read, of any of `FORMATS`.
        tokenizer: the model's.
        config: ``seq`` is the longest sequence in tokens, ``train_on_prompt`` takes the loss on everything.

    Raises:
        BadRowError: the row cannot be used, with what is wrong.
    """
    if row.problem:
        raise BadRowError(row.problem)
    parts = list(_parts(row.fields, tokenizer))
    ids, learned = tokenize(parts, tokenizer)
    labels = ids if config.train_on_prompt else np.where(learned, ids, IGNORED).astype(np.int32)
    cut = max(0, len(ids) - config.seq)
    return Encoded(input_ids=ids[: config.seq], labels=labels[: config.seq], cut=cut)


def targets(labels: NDArray[np.int32]) -> int:
    """Tokens that the loss is taken on: those with a label, except the first, which nothing predicts."""
    return int((labels[1:] != IGNORED).sum())


def tokenize(parts: Sequence[Part], tokenizer: Any) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Tokens of the joined text, and which of them the model is to learn: those with a character of a learned part.

    Joined, because tokenizers such as SentencePiece's put a space before every text they are given. A tokenizer that
    cannot say where its tokens lie gets the parts one by one.

    Returns:
        int32 [tokens], bool [tokens].
    """
    if not getattr(tokenizer, "is_fast", False):
        pieces = [tokenizer(part.text, add_special_tokens=False)["input_ids"] for part in parts]
        flags = [np.full(len(piece), part.learned) for piece, part in zip(pieces, parts, strict=True)]
        return np.concatenate([np.asarray(piece, np.int32) for piece in pieces]), np.concatenate(flags)
    text = "".join(part.text for part in parts)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(coded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    learned_up_to = np.zeros(len(text) + 1, dtype=np.int64)  # learned characters before each position
    place = 0
    for part in parts:
        steps = np.arange(1, len(part.text) + 1) * int(part.learned)
        learned_up_to[place + 1 : place + 1 + len(part.text)] = learned_up_to[place] + steps
        place += len(part.text)
    # A token of no width (a lone space marker) belongs where the next character does.
    ends = np.maximum(offsets[:, 1], np.minimum(offsets[:, 0] + 1, len(text)))
    return np.asarray(coded["input_ids"], np.int32), learned_up_to[ends] > learned_up_to[offsets[:, 0]]


def _parts(fields: Any, tokenizer: Any) -> Iterator[Part]:
    if not isinstance(fields, dict):
        raise BadRowError(f"a {type(fields).__name__}, not a mapping of column to value")
    match _format_of(fields):
        case "messages":
            yield from _conversation(_messages(fields["messages"], "messages"), tokenizer, learn_from=0)
        case "prompt/completion":
            yield from _prompt_completion(fields, tokenizer)
        case "alpaca":
            yield from _alpaca(fields, tokenizer)
        case _:
            ending = tokenizer.eos_token or ""
            text = _text(fields, "text")
            start = tokenizer.bos_token if _adds_bos(tokenizer) and not text.startswith(tokenizer.bos_token) else ""
            yield Part(text=start, learned=False)
            yield Part(text=text if ending and text.endswith(ending) else text + ending, learned=True)


def _format_of(fields: Mapping[str, Any]) -> str:
    for name, columns in FORMATS.items():
        if all(fields.get(column) is not None for column in columns):
            return name
    wanted = sorted({column for columns in FORMATS.values() for column in columns})
    present = [column for column, value in fields.items() if value is not None]
    told = []
    for column in present:
        near = difflib.get_close_matches(str(column), wanted, n=1)
        told.append(f"{column} (did you mean {near[0]}?)" if near and column not in wanted else str(column))
    formats = "; or ".join(" + ".join(columns) for columns in FORMATS.values())
    raise BadRowError(f"its columns are {', '.join(told) or 'none'}; a row needs {formats}")


def _text(fields: Mapping[str, Any], column: str) -> str:
    value = fields[column]
    if not isinstance(value, str):
        raise BadRowError(f"{column} is a {type(value).__name__}, not text")
    if not value.strip():
        raise BadRowError(f"{column} is empty")
    return value


def _prompt_completion(fields: Mapping[str, Any], tokenizer: Any) -> Iterator[Part]:
    if isinstance(fields["prompt"], list):
        prompt = _messages(fields["prompt"], "prompt")
        completion = _messages(fields["completion"], "completion")
        yield from _conversation(prompt + completion, tokenizer, learn_from=len(prompt))
        return
    prompt_text, completion_text = _text(fields, "prompt"), _text(fields, "completion")
    yield from _answer(prompt_text, completion_text, tokenizer, plain_prompt=prompt_text)


def _alpaca(fields: Mapping[str, Any], tokenizer: Any) -> Iterator[Part]:
    """Alpaca's columns; without a chat template its own wording (https://github.com/tatsu-lab/stanford_alpaca)."""
    instruction, output = _text(fields, "instruction"), _text(fields, "output")
    given = fields.get("input") or ""
    if not isinstance(given, str):
        raise BadRowError(f"input is a {type(given).__name__}, not text")
    context = f"\n\n### Input:\n{given}" if given.strip() else ""
    plain = f"### Instruction:\n{instruction}{context}\n\n### Response:\n"
    asked = f"{instruction}\n\n{given}" if given.strip() else instruction
    yield from _answer(asked, output, tokenizer, plain_prompt=plain)


def _answer(prompt: str, completion: str, tokenizer: Any, *, plain_prompt: str) -> Iterator[Part]:
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        yield from _conversation(messages, tokenizer, learn_from=1)
        return
    yield Part(text=(tokenizer.bos_token if _adds_bos(tokenizer) else "") + plain_prompt, learned=False)
    yield Part(text=completion + (tokenizer.eos_token or ""), learned=True)


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself begins a text with its BOS token; a chat template says so on its own."""
    if tokenizer.bos_token is None:
        return False
    return bool(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadRowError(
            f"{column} is {'an empty list' if value == [] else f'a {type(value).__name__}'}, not messages"
        )
    for number, message in enumerate(value, start=1):
        where = f"message {number} of {column}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise BadRowError(f"{where} needs a role and a content")
        if message["role"] not in ROLES:
            near = difflib.get_close_matches(str(message["role"]), ROLES, n=1)
            guess = f" (did you mean {near[0]}?)" if near else ""
            raise BadRowError(f"{where} has the role {message['role']!r}{guess}; roles are {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise BadRowError(f"the content of {where} is a {type(message['content']).__name__}, not text")
        if message["role"] == "assistant" and not message["content"].strip():
            raise BadRowError(f"the content of {where}, an answer, is empty")
    return value


def _conversation(messages: list[dict[str, Any]], tokenizer: Any, *, learn_from: int) -> Iterator[Part]:
    """The rendered conversation, cut where the assistant's turns from ``learn_from`` on begin and end.

    A turn begins where the prompt for it would end, so that what is learned is what the model is asked to write. (Where
    the template's prompt opens with something that the recorded answer lacks, a thought, it begins where they part.)
    """
    if not tokenizer.chat_template:
        raise BadRowError("messages need a chat template, and the tokenizer has none; use prompt + completion rows")
    learned = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= learn_from]
    if not learned:
        raise BadRowError("there is no assistant turn to learn from")
    whole = _rendered(messages, tokenizer)
    place = 0
    for turn in learned:
        prompt = _rendered(messages[:turn], tokenizer, ask=True)
        answered = _rendered(messages[: turn + 1], tokenizer)
        begin = len(os.path.commonprefix([prompt, answered]))  # noqa: RUF071  characters, not folders
        before = _rendered(messages[:turn], tokenizer) if turn else ""
        if not (whole.startswith(answered) and begin >= max(place, len(before))):
            raise BadRowError(
                f"the chat template writes message {turn + 1} differently when others follow, so that an answer has no "
                "fixed place; give the last answer alone, as prompt + completion"
            )
        yield Part(text=whole[place:begin], learned=False)
        yield Part(text=whole[begin : len(answered)], learned=True)
        place = len(answered)
    yield Part(text=whole[place:], learned=False)


def _rendered(messages: list[dict[str, Any]], tokenizer: Any, *, ask: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except TemplateError as error:
        raise BadRowError(f"the chat template refuses it: {error}") from None
