"""Reads the flags of the split: rows of a step, rows of a micro-batch, and whether the run chooses the latter."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from finetune.config import yaml_file
from finetune.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.config.settings import RunConfig

AUTO = "auto"
ONE_OF_TWO = "give one of the two"


def with_batch(config: RunConfig) -> RunConfig:
    """Return the settings with the accumulation that ``batch`` asks for; unchanged without ``batch``.

    Args:
        config: the validated settings, in which ``micro_batch`` divides ``batch`` if it is given.
    """
    train = config.train
    if train.batch is None:
        return config
    micro_batch = 1 if train.split == "auto" else train.micro_batch
    return yaml_file.replace(config, {"micro_batch": micro_batch, "accumulation": train.batch // micro_batch})


def expanded(flags: Sequence[str]) -> list[str]:
    """Return the flags with ``--micro-batch auto`` and the implied flags written out.

    With ``--micro-batch N`` the run no longer chooses the split, and ``--accumulation`` overrides a ``batch`` of the
    YAML file.

    Raises:
        ConfigError: ``--batch`` and ``--accumulation`` are both given, or ``--micro-batch auto`` and ``--split given``.
    """
    words = _apart(flags)
    if "--batch" in words and "--accumulation" in words:
        at = words.index("--batch")
        value = words[at + 1] if at + 1 < len(words) else None
        why = "--accumulation is given too, and follows from it"
        raise ConfigError(Problem(field="batch", value=value, why=why, remedy=ONE_OF_TWO))
    if "--accumulation" in words:
        words += ["--batch", "None"]
    if "--micro-batch" in words:
        at = words.index("--micro-batch")
        automatic = words[at + 1 : at + 2] == [AUTO]
        if automatic and "given" in [after for word, after in itertools.pairwise(words) if word == "--split"]:
            why = "--split given is given too"
            raise ConfigError(Problem(field="micro_batch", value=AUTO, why=why, remedy=ONE_OF_TWO))
        if automatic:
            del words[at : at + 2]
        if "--split" not in words:
            words += ["--split", "auto" if automatic else "given"]
    return words


def _apart(flags: Sequence[str]) -> list[str]:
    """Return the flags with one spelling for those of the split: ``--micro_batch=2`` becomes ``--micro-batch 2``."""
    words: list[str] = []
    for word in flags:
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name in ("--batch", "--micro-batch", "--accumulation", "--split"):
            words += [name, value] if equals else [name]
        else:
            words.append(word)
    return words
