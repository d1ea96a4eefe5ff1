"""A stand-in tokenizer has the model's vocabulary size, and the special tokens that its configuration numbers."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from typing import TYPE_CHECKING

from transformers import AutoTokenizer

from pytest_vram.errors import VramUsageError
from pytest_vram.standins.tokenizer import write_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("size", [16, 100, 300, 1000])
def test_every_number_has_a_token_and_text_is_told_apart(size: int, tmp_path: Path) -> None:
    fields = {"vocab_size": size, "bos_token_id": 1, "eos_token_id": [2, 3], "max_position_embeddings": 77}
    write_tokenizer(tmp_path, fields)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    assert len(tokenizer) == size
    assert sorted(tokenizer.get_vocab().values()) == list(range(size))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (1, 2, 77)
    assert len({tokenizer.pad_token_id, tokenizer.unk_token_id, 1, 2}) == 4
    for text in ("word", "\n", "two words", "é"):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) >= len(text.split()), "a word is at least one token"
        assert all(0 <= number < size for number in ids)
    if size >= 100:
        assert tokenizer.unk_token_id not in tokenizer("two words\n")["input_ids"], "spaces and new lines come first"
    if size == 1000:
        assert len(tokenizer("the function is the name")["input_ids"]) < 12, "English has about its usual length"
    if size >= 300:
        assert tokenizer.decode(tokenizer("Grüße, two words\n")["input_ids"]) == "Grüße, two words\n"
        assert tokenizer("yes")["input_ids"] != tokenizer("no")["input_ids"]


def test_a_chat_template_keeps_turns_apart_and_roles_may_share_a_number(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, {"vocab_size": 400, "bos_token_id": 7, "eos_token_id": 7})
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (7, 7)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    merges = (tmp_path / "merges.txt").read_text().splitlines()
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    assert all("".join(line.split()) in vocabulary for line in merges[1:])


@pytest.mark.parametrize("size", [None, 15, "many"])
def test_a_vocabulary_that_cannot_be(size: object, tmp_path: Path) -> None:
    with pytest.raises(VramUsageError, match="vocab_size"):
        write_tokenizer(tmp_path, {"vocab_size": size})
