"""Write a tokenizer that stands in for a model's own: it has the model's vocabulary size and special tokens' numbers.

It is a byte-level BPE, which is trained in a moment on the help texts that come with Python. So English text gets about
as many tokens as from a real tokenizer, and the ids of different texts differ.
"""

from __future__ import annotations

import json
import pydoc_data.topics
from typing import TYPE_CHECKING, Any

from pytest_vram.errors import VramUsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
"""A folder with one of these has a tokenizer of its own."""

_LEARNED = 16_000
_LEAST = 16
_LONGEST = 10**6
_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | string + "
    "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_TURNS = ("<|im_start|>", "<|im_end|>")


def write_tokenizer(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json``, ``vocab.json`` and ``merges.txt``.

    Args:
        folder: the folder of the model.
        fields: the fields of the model's configuration: ``vocab_size``, and where it has them ``bos_token_id``,
            ``eos_token_id``, ``pad_token_id`` and ``max_position_embeddings``.

    Raises:
        VramUsageError: the configuration has no vocabulary, or one of fewer than 16 tokens.
    """
    size = fields.get("vocab_size")
    if not isinstance(size, int) or size < _LEAST:
        raise VramUsageError(
            f"vocab_size = {size!r}: a stand-in tokenizer needs a vocabulary of at least {_LEAST} tokens; put the"
            " model's own tokenizer into the folder with the config.json"
        )
    special, roles = _special_tokens(fields, size)
    content = _byte_pairs(size, special, roles["unk_token"])
    folder.joinpath("tokenizer.json").write_text(json.dumps(content))
    # The same in GPT-2's format, which torchtune and older tokenizers read.
    plain = {token: number for token, number in content["model"]["vocab"].items() if number not in special}
    folder.joinpath("vocab.json").write_text(json.dumps(plain))
    merges = "".join(f"{' '.join(pair)}\n" for pair in content["model"]["merges"])
    folder.joinpath("merges.txt").write_text(f"#version: 0.2\n{merges}")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields.get("max_position_embeddings") or _LONGEST,
        "chat_template": _CHAT,
        "clean_up_tokenization_spaces": False,
        **roles,
    }
    folder.joinpath("tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _special_tokens(fields: Mapping[str, Any], size: int) -> tuple[dict[int, str], dict[str, str]]:
    """Return the special tokens by number, and the token of each role.

    The configuration numbers some roles; two of them may share a number. Other tokens are numbered from the end.
    """
    found: dict[int, str] = {}
    roles = dict(_ROLES)
    for role, token in _ROLES.items():
        number = fields.get(f"{role}_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < size:
            roles[role] = found.setdefault(number, token)
    free = (number for number in range(size - 1, -1, -1) if number not in found)
    for token in (*roles.values(), *_TURNS):
        if token not in found.values():
            found[next(free)] = token
    return found, roles


def _byte_pairs(size: int, special: Mapping[int, str], unknown: str) -> dict[str, Any]:
    """Return the content of ``tokenizer.json``: every number from 0 to ``size`` - 1 has a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    room = size - len(special)
    # Without "Ġ" and "Ċ", which stand for a space and a new line, every word of a small vocabulary would be unknown.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: (letter not in "ĠĊ", ord(letter)))
    trainer = trainers.BpeTrainer(
        vocab_size=min(room, _LEARNED),
        initial_alphabet=alphabet[:room],
        limit_alphabet=min(room, len(alphabet)),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_help_texts(), trainer)
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    model = content["model"]
    learned = sorted(model["vocab"], key=model["vocab"].__getitem__)[:room]
    names = iter([*learned, *(f"<unused{number}>" for number in range(room - len(learned)))])
    model["vocab"] = {special.get(number) or next(names): number for number in range(size)}
    kept = set(learned)
    model["merges"] = [pair for pair in model["merges"] if set(pair) <= kept and "".join(pair) in kept]
    content["added_tokens"] = [_added(number, token) for number, token in sorted(special.items())]
    return content


def _help_texts() -> Iterable[str]:
    return pydoc_data.topics.topics.values()


def _added(number: int, token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, "special": True, **flags}
