"""Compares the data with the model's tables of tokens and positions before training, and enlarges them on request.

A token id or a position beyond its table fails in the middle of a run, at the first step whose rows hold it. On a GPU
the error names neither.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

    from finetune.config.settings import RunConfig
    from finetune.data.batches import DataSplit

NEW_TOKENS_ATTRIBUTE = "finetune_new_tokens"
"""Set on a model whose embeddings were enlarged: the ids of the tokens that were added."""
_SHOWN_TOKENS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """How many tokens and positions a model knows."""

    tokens: int
    """Number of rows of the embeddings, or of the head if it has fewer."""
    positions: int | None
    """Tokens of the longest row; None if positions are computed (RoPE, ALiBi) and no table limits them."""


def tables_of(model: PreTrainedModel) -> Tables:
    """Read the sizes of a model's tables from its modules."""
    tokens = _rows(model.get_input_embeddings())
    head = model.get_output_embeddings()
    if head is not None:
        tokens = min(tokens, _rows(head))
    return Tables(tokens=tokens, positions=min(_position_limits(model), default=None))


def _rows(module: Any) -> int:
    found = getattr(module, "num_embeddings", None) or getattr(module, "out_features", None)
    return int(found if found is not None else module.weight.shape[0])


def _position_limits(model: PreTrainedModel) -> Iterator[int]:
    """Return the longest row that each table of learned or precomputed positions allows.

    A table may reserve its first rows: OPT's has an ``offset``, and RoBERTa's reserves the rows up to its padding row.
    A table belongs to the positions of text, and not to those of an image, if its size without the reserved rows is
    the one that the config names.
    """
    config = model.config.get_text_config()
    said = getattr(config, "max_position_embeddings", None)
    if config.model_type == "mpt":  # its ALiBi biases are computed for this number of tokens
        yield int(config.max_seq_len)
    words = model.get_input_embeddings()
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and module is not words and ("pos" in last or last == "wpe"):
            kept = int(getattr(module, "offset", 0) or 0)
            if not kept and module.padding_idx is not None:
                kept = module.padding_idx + 1
            if said in (None, module.num_embeddings, module.num_embeddings - kept):
                yield module.num_embeddings - kept
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in ("embed_positions", "pos_encoding") and buffer.dim() == 2:
            yield buffer.shape[0]


def check_tables(tables: Tables, data: DataSplit, tokenizer: Any, config: RunConfig) -> None:
    """Check that every token id and the longest row of the data are within the model's tables.

    Raises:
        DataError: a row has a token or a position beyond them. The message names the row, the token and the remedy.
    """
    sets = [(data.train.rows, data.stats.train)]
    if data.stats.held_out is not None:
        sets.append((data.held_out.rows, data.stats.held_out))
    for rows, counts in sets:
        if counts.largest_id >= tables.tokens:
            raise DataError(_unknown_token(rows, tables.tokens, tokenizer, config))
        if tables.positions is not None and counts.longest > tables.positions:
            raise DataError(_too_long(rows, tables.positions, config))


def check_question(tables: Tables, input_ids: Sequence[int], tokenizer: Any) -> None:
    """Check that the tokens of ``--question`` are within the model's tables.

    Raises:
        ConfigError: a token is beyond them, or the question leaves no position for an answer.
    """
    beyond = [token for token in input_ids if token >= tables.tokens]
    why = f"{_spelled(beyond[0], tokenizer)} is beyond the model's {tables.tokens:,} embedding rows" if beyond else None
    if tables.positions is not None and len(input_ids) >= tables.positions:
        why = f"it is {len(input_ids):,} tokens long, and the model's position table has {tables.positions:,} rows"
    if why is not None:
        remedy = "ask something else, or --answer-tokens 0 to ask nothing"
        raise ConfigError(Problem(field="question", value=tokenizer.decode(list(input_ids)), why=why, remedy=remedy))


def padded_within(data: DataSplit, tables: Tables, tokenizer: Any) -> tuple[DataSplit, str | None]:
    """Return the same data with a padding token that the model knows, and a note for the user if that is another one.

    The model ignores padding, so that any token can serve.
    """
    pad = data.train.pad_id
    if pad < tables.tokens:
        return data, None
    eos = tokenizer.eos_token_id
    other = eos if eos is not None and eos < tables.tokens else 0
    note = (
        f"the padding token, {_spelled(pad, tokenizer)}, is beyond the model's {tables.tokens:,} embedding rows: "
        f"batches are filled up with {_spelled(other, tokenizer)} instead, which changes no result"
    )
    train, held_out = (replace(examples, pad_id=other) for examples in (data.train, data.held_out))
    return replace(data, train=train, held_out=held_out), note


def told_of_unknown_tokens(tables: Tables, tokenizer: Any) -> str | None:
    """Return a note for a tokenizer that has tokens beyond the model's tables, though no row contains one."""
    count = len(tokenizer) - tables.tokens
    if count <= 0:
        return None
    return (
        f"the tokenizer has {count:,} {'token' if count == 1 else 'tokens'} beyond the model's {tables.tokens:,} "
        f"embedding rows (from {_spelled(tables.tokens, tokenizer)} on); no row holds one of them"
    )


def resize_embeddings(model: PreTrainedModel, tokens: int) -> None:
    """Give embeddings and head a row for each of ``tokens`` tokens. A model with as many rows is not changed.

    Each new row begins as the mean of the old rows. transformers adds noise to that mean; without the noise, a resumed
    run gets the same model again. The number of rows is not rounded up, because peft resizes a base to the exact size
    of its tokenizer when it loads an adapter.

    Raises:
        ConfigError: the head has a bias, which peft leaves out when it trains rows of a head.
    """
    before = tables_of(model).tokens
    if tokens <= before:
        return
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ConfigError(
            Problem(
                field="resize_embeddings",
                value=True,
                why=f"the head of this {model.config.model_type} model has a bias, and peft trains new rows without it",
                remedy="use the model's own tokenizer, or enlarge the model with transformers and save it first",
            )
        )
    model.resize_token_embeddings(tokens, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(module, "weight", None)
        if weight is not None:
            with torch.no_grad():
                weight[before:] = weight[:before].mean(dim=0, dtype=torch.float32).to(weight.dtype)
            weight.requires_grad_(False)
    setattr(model, NEW_TOKENS_ATTRIBUTE, tuple(range(before, tokens)))


def new_token_rows(model: PreTrainedModel) -> dict[str, list[int]] | None:
    """Return the new rows that an adapter has to train beside its own matrices, in the form that peft's config takes.

    Returns:
        Token ids by the name of the embedding, and of a head that has weights of its own; None if no row was added.
    """
    added = getattr(model, NEW_TOKENS_ATTRIBUTE, ())
    if not added:
        return None
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    own_head = head is not None and head.weight is not words.weight
    wanted = [words, head] if own_head else [words]
    return {name: list(added) for name, module in model.named_modules() if any(module is one for one in wanted)}


def told_of_new_rows(model: PreTrainedModel) -> str | None:
    """Return a note about the cost of ``--resize-embeddings``; None if no row was added."""
    modules = new_token_rows(model)
    if modules is None:
        return None
    added = getattr(model, NEW_TOKENS_ATTRIBUTE)
    width = model.get_input_embeddings().weight.shape[1]
    count = len(added) * width * len(modules)
    return (
        f"{len(added):,} embedding rows added (ids {added[0]:,} to {added[-1]:,}), trained and saved with the adapter: "
        f"{count:,} parameters in {' and '.join(modules)}. To load the adapter, enlarge the base first: "
        f"base.resize_token_embeddings({added[-1] + 1}); AutoPeftModelForCausalLM does so by itself"
    )


def _unknown_token(rows: Any, tokens: int, tokenizer: Any, config: RunConfig) -> str:
    first, count, found = "", 0, dict[int, str]()
    for batch in rows.iter(batch_size=256):
        for source, ids in zip(batch["source"], batch["input_ids"], strict=True):
            beyond = [token for token in ids if token >= tokens]
            if beyond:
                first, count = first or source, count + 1
                for token in beyond:
                    found.setdefault(token, _spelled(token, tokenizer))
    shown = ", ".join(list(found.values())[:_SHOWN_TOKENS]) + (", ..." if len(found) > _SHOWN_TOKENS else "")
    others = ""
    if count > 1 or len(found) > 1:
        others = f" (such tokens are in {count:,} {'row' if count == 1 else 'rows'}: {shown})"
    return (
        f"{first}: holds the token {next(iter(found.values()))}, and the embeddings of {config.model.model} have "
        f"{tokens:,} rows{others}. Its tokenizer has {len(tokenizer):,} tokens. Add rows and train them with "
        "--resize-embeddings, or use the tokenizer that the model was trained with"
    )


def _too_long(rows: Any, positions: int, config: RunConfig) -> str:
    first, length, count = "", 0, 0
    for batch in rows.select_columns(["source", "length"]).iter(batch_size=4096):
        for source, tokens in zip(batch["source"], batch["length"], strict=True):
            if tokens > positions:
                first, length, count = first or source, length or tokens, count + 1
    return (
        f"{first}: {length:,} tokens, and the position table of {config.model.model} has {positions:,} rows"
        f"{f' ({count:,} rows are too long)' if count > 1 else ''}. Cut rows with --seq {positions} or less, or use a "
        "model that reads longer texts"
    )


def _spelled(token: int, tokenizer: Any) -> str:
    """Return a token as text and number."""
    return f"{tokenizer.convert_ids_to_tokens(token)!r} (id {token:,})"
