"""Asks the model one question before and after training, to show what a loss cannot show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune.data.encode import IGNORED
from finetune.model.embeddings import tables_of
from finetune.model.forward import base_model
from finetune.model.parts import is_sharded

_MARK = "QUESTION"
_SHOWN = 400  # characters of a prompt that are printed
_CONSIDERED = 100  # held-out rows among which a question is looked for
_REPETITION_PENALTY = 1.1

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune.config.settings import OutputConfig
    from finetune.data.batches import Example, ExampleSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt as text for people and as tokens for the model."""

    text: str
    """The question, or the end of a long prompt."""
    input_ids: tuple[int, ...]
    """The prompt with the chat template around it, up to where the answer starts."""


def choose_question(config: OutputConfig, tokenizer: Any, held_out: ExampleSet) -> Question | None:
    """Return ``config.question``, or else the shortest held-out prompt. None means that nothing is asked."""
    if config.answer_tokens == 0:
        return None
    if config.question is not None:
        return Question(text=config.question, input_ids=_chat(tokenizer, config.question))
    prompts = [prompt for index in range(min(len(held_out), _CONSIDERED)) if (prompt := _prompt(held_out[index]))]
    if not prompts:
        return None
    shortest = min(prompts, key=len)
    return Question(text=_question_in(tokenizer, shortest)[-_SHOWN:], input_ids=shortest)


def answer(model: PreTrainedModel, tokenizer: Any, question: Question, *, max_tokens: int) -> str:
    """Return the model's answer of at most ``max_tokens`` tokens. A short position table may allow fewer.

    Each token is the likeliest one, after a repetition penalty has lowered the tokens that occurred before
    (https://arxiv.org/abs/1909.05858). No random number is drawn. Over a sharded base all ranks have to call this.
    """
    was_training = model.training
    model.train(False)
    room = tables_of(base_model(model)).positions
    together = is_sharded(model)  # gathered weights that were made in inference mode could not be trained through
    try:
        ids = torch.tensor([question.input_ids], device=next(model.parameters()).device)
        with torch.no_grad() if together else torch.inference_mode():
            out: Any = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens if room is None else min(max_tokens, room - ids.shape[1]),
                do_sample=False,
                synced_gpus=together,
                repetition_penalty=_REPETITION_PENALTY,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
    finally:
        model.train(was_training)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())


def _prompt(example: Example) -> tuple[int, ...]:
    """Return the tokens before the first target; none for plain text, which has no prompt."""
    first = next((i for i, label in enumerate(example.labels) if label != IGNORED), len(example.labels))
    return tuple(int(token) for token in example.input_ids[:first]) if first > 1 else ()


def _question_in(tokenizer: Any, prompt: tuple[int, ...]) -> str:
    """Return the user's words in a prompt, without the text that the chat template puts around them."""
    if tokenizer.chat_template:
        before, _, after = _templated(tokenizer, _MARK).partition(_MARK)
        text = tokenizer.decode(prompt)
        if text.startswith(before) and text.endswith(after):
            return str(text[len(before) : len(text) - len(after)])
    return str(tokenizer.decode(prompt, skip_special_tokens=True).strip())


def _templated(tokenizer: Any, question: str) -> str:
    turns = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def _chat(tokenizer: Any, question: str) -> tuple[int, ...]:
    if not tokenizer.chat_template:
        return tuple(tokenizer(question)["input_ids"])
    return tuple(tokenizer(_templated(tokenizer, question), add_special_tokens=False)["input_ids"])
