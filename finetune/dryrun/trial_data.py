"""Loads what a dry run uses of the data, if it is on this machine: the model's tokenizer, and the rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.batches import load_examples
from finetune.errors import ModelError
from finetune.model.embeddings import check_tables, tables_of
from finetune.model.load import load_tokenizer
from finetune.model.shapes import find_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune.config.settings import RunConfig


def tokenizer_of(config: RunConfig) -> Any:
    """Load the model's tokenizer.

    Returns:
        The tokenizer; None for a shape, for the embedded model, and if the tokenizer cannot be loaded.
    """
    name = config.model.model
    if find_shape(name) is not None:  # the embedded model has one
        return None
    try:
        return load_tokenizer(config.model)
    except ModelError:
        return None


def check_rows(config: RunConfig, model: PreTrainedModel) -> None:
    """Check the rows of --data and --eval-data against the model's tables, as a run does before it trains.

    A dry run needs neither rows nor tokenizer. If the data is not in local files, or there is no tokenizer, nothing is
    checked.

    Raises:
        DataError: a row cannot be used, or has a token or a position that the model's tables do not have.
    """
    files = [name for name in (config.data.data, config.data.eval_data) if name is not None]
    if not all(Path(name).is_file() for name in files):
        return
    tokenizer = tokenizer_of(config)
    if tokenizer is not None:
        data = load_examples(config.data, tokenizer, seed=config.train.seed)
        check_tables(tables_of(model), data, tokenizer, config)
