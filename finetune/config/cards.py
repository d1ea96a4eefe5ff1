"""How many cards a dry run has, and what that number may be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune import launch
from finetune.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from finetune.config.settings import RunConfig

MOST = 64
"""The dry GPU has so many cards at most."""


def dry_ranks(config: RunConfig) -> int:
    """Return the number of ranks that a dry run takes the steps of: ``--count``, or the ranks of the launcher."""
    return launch.size() if config.dry.count is None else config.dry.count


def count_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what is wrong with ``--count``, and with a dry run that shards over the wrong number of cards."""
    dry, count = config.dry, config.dry.count
    wet = not (dry.dry_run or dry.fit)
    if count is not None and wet:
        why = "it is the number of cards of a dry run, and this is not a dry run"
        remedy = f"add --dry-run or --fit; to train on {count} cards, start the run with torchrun"
        yield Problem(field="count", value=count, why=why, remedy=remedy)
    elif count is not None and not 1 <= count <= MOST:
        why = f"a dry run has 1 to {MOST} cards"
        yield Problem(field="count", value=count, why=why, remedy="use --count 2, or leave it out for one card")
    elif not wet and config.model.shard and dry_ranks(config) == 1:
        remedy = "say how many cards there are, such as --count 2, or use --no-shard"
        why = "it spreads the base over several cards, and this dry run has one"
        yield Problem(field="shard", value=True, why=why, remedy=remedy)
    if not wet and count is not None and config.train.accumulation < count <= MOST:
        why = f"each of the {count} ranks takes whole micro-batches, and a step has only {config.train.accumulation}"
        remedy = f"use --accumulation {count} or more"
        yield Problem(field="accumulation", value=config.train.accumulation, why=why, remedy=remedy)
