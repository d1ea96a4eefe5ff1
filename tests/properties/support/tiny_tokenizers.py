"""Tokenizers made in milliseconds: bytes alone, or with merges; with and without a chat template."""

from __future__ import annotations

from functools import cache
from typing import Any

END = "<|end|>"
CHAT_TEMPLATE = (
    "{% if messages and messages[0]['role'] != 'system' %}<|system|>be brief<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Like SmolLM2's: a system prompt of its own, and no mark around what the assistant says."""
SAMPLE = [
    "the cat sat on the mat",
    "that is the thing with the hat",
    "12 and 12 are 24",
    "answer: the answer is here",
] * 3


def tiny_tokenizer(*, merges: bool = False, chat: bool = True, bos: bool = False) -> Any:
    """A byte-level tokenizer whose padding token is the one that ends a turn, as with SmolLM2.

    Args:
        merges: train a few hundred merges, so that a token may span words and the border of prompt and answer.
        chat: with a chat template.
        bos: begin every text with a token of its own, as Llama's does.
    """
    return _made(merges, chat, bos)


@cache
def _made(merges: bool, chat: bool, bos: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END, "<|user|>", "<|assistant|>", "<|system|>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=merges)
    raw.decoder = decoders.ByteLevel()
    size = len(alphabet) + len(special) + (200 if merges else 0)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(alphabet), special_tokens=special, show_progress=False
    )
    raw.train_from_iterator(SAMPLE if merges else [], trainer)
    settings: dict[str, Any] = {"eos_token": END, "pad_token": END, "additional_special_tokens": special[1:4]}
    if bos:
        settings["bos_token"] = "<s>"
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **settings)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
