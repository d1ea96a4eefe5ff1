"""Reads ``--checkpointing``: how many of the decoder's layers compute their activations again in the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.config.settings import Checkpointing

FLAG, OFF = "--checkpointing", "--no-checkpointing"
_WORDS = {"auto": "auto", "all": "all", "none": "none", "true": "all", "false": "none"}


def layers_recomputed(setting: Checkpointing, layers: int) -> int:
    """Return how many of a model's layers recompute their activations.

    Args:
        setting: ``all``, ``none`` or a number. True and False mean all and none, as in runs that were recorded when the
            setting was a switch. ``auto`` means all, until a run has chosen a number.
        layers: the layers that the model can recompute.
    """
    if isinstance(setting, bool):
        return layers if setting else 0
    if isinstance(setting, int):
        return min(setting, layers)
    return 0 if setting == "none" else layers


def spelled(setting: Any) -> Any:
    """Return ``all`` or ``none`` for True or False, and any other value as it is."""
    return ("all" if setting else "none") if isinstance(setting, bool) else setting


def expanded(flags: Sequence[str]) -> list[str]:
    """Return the flags with a value after each ``--checkpointing``, and without ``--no-checkpointing``.

    ``--checkpointing`` alone means all layers, and ``--no-checkpointing`` none.

    Raises:
        ConfigError: the value is neither auto, all, none nor a whole number.
    """
    words: list[str] = []
    rest = list(flags)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name not in (FLAG, OFF):
            words.append(word)
        elif name == OFF:
            words += [FLAG, "none"]
        elif equals:
            words += [FLAG, _checked(value)]
        elif rest and not rest[0].startswith("--"):
            words += [FLAG, _checked(rest.pop(0))]
        else:
            words += [FLAG, "all"]
    return words


def _checked(value: str) -> str:
    found = _WORDS.get(value.lower(), value)
    if found in _WORDS or found.lstrip("-").isdecimal():
        return found
    raise ConfigError(
        Problem(
            field="checkpointing",
            value=value,
            why="not a choice of layers",
            remedy="use auto, all, none, or the number of layers that are computed again",
        )
    )
