"""One question, asked of the model before and after training: what a loss cannot show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

IGNORED = -100
_SHOWN = 400  # characters of a prompt that are printed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune.config import OutputConfig
    from finetune.data import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt as text for people and as tokens for the model."""

    text: str
    """The question, or the end of a long prompt."""
    input_ids: tuple[int, ...]
    """The prompt with the chat template around it, up to where the answer starts."""


def choose_question(config: OutputConfig, tokenizer: Any, held_out: Any) -> Question | None:
    """The question of a run: ``config.question``, else the first held-out prompt; None where nothing is to be asked."""
    if config.answer_tokens == 0:
        return None
    if config.question is not None:
        return Question(text=config.question, input_ids=_chat(tokenizer, config.question))
    for index in range(len(held_out)):
        prompt = _prompt(held_out[index])
        if prompt:
            text = tokenizer.decode(prompt, skip_special_tokens=True).strip()
            return Question(text=text[-_SHOWN:], input_ids=prompt)
    return None


def answer(model: PreTrainedModel, tokenizer: Any, question: Question, *, max_tokens: int) -> str:
    """What the model answers, greedily, in at most ``max_tokens`` tokens. Draws no random number."""
    was_training = model.training
    model.eval()
    try:
        ids = torch.tensor([question.input_ids], device=next(model.parameters()).device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
    finally:
        model.train(was_training)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def _prompt(example: Example) -> tuple[int, ...]:
    """The tokens before the first that the loss is taken on; none for plain text, which has no prompt."""
    first = next((i for i, label in enumerate(example.labels) if label != IGNORED), len(example.labels))
    return tuple(int(token) for token in example.input_ids[:first]) if first > 1 else ()


def _chat(tokenizer: Any, question: str) -> tuple[int, ...]:
    if not tokenizer.chat_template:
        return tuple(tokenizer(question)["input_ids"])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
