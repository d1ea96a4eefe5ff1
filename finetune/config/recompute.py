"""Reads ``--checkpointing`` and ``--offload-activations``: which layers recompute, and where their inputs wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.config.settings import Checkpointing, OnHost, TrainConfig

FLAG, OFF = "--checkpointing", "--no-checkpointing"
ON_HOST, ON_CARD = "--offload-activations", "--no-offload-activations"
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


def inputs_on_host(setting: OnHost, device: str, *, sharded: bool) -> bool:
    """Return whether the inputs of the layers that recompute wait in host memory.

    Args:
        setting: True, False, or ``auto``: until a run has chosen, they do on a card.
        device: the kind of device, or ``auto``, which stands for a card.
        sharded: whether the layers of the base are spread over several cards. They are gathered over the bus that the
            copies would take, so ``auto`` leaves the inputs on the card.
    """
    return bool(setting) if isinstance(setting, bool) else device != "cpu" and not sharded


def place_is_open(train: TrainConfig) -> bool:
    """Return whether a run on a card chooses where the inputs of the layers that recompute wait: some may recompute."""
    return train.offload_activations == "auto" and spelled(train.checkpointing) not in ("none", 0)


def spelled(setting: Any) -> Any:
    """Return ``all`` or ``none`` for True or False, and any other value as it is."""
    return ("all" if setting else "none") if isinstance(setting, bool) else setting


def expanded(flags: Sequence[str]) -> list[str]:
    """Return the flags with a value after each ``--checkpointing``, and without ``--no-checkpointing``.

    ``--checkpointing`` alone means all layers, and ``--no-checkpointing`` none. In the same way
    ``--offload-activations`` alone means True, and ``--no-offload-activations`` False.

    Raises:
        ConfigError: the value is neither auto, all, none nor a whole number.
    """
    words: list[str] = []
    rest = list(flags)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in (OFF, ON_CARD):
            words += [FLAG, "none"] if name == OFF else [ON_HOST, "False"]
        elif name in (FLAG, ON_HOST):
            if not equals and rest and not rest[0].startswith("--"):
                equals, value = "=", rest.pop(0)
            alone = "all" if name == FLAG else "True"
            words += [name, (_checked(value) if name == FLAG else _checked_place(value)) if equals else alone]
        else:
            words.append(word)
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


def _checked_place(value: str) -> str:
    found = {"auto": "auto", "true": "True", "false": "False"}.get(value.lower())
    if found is not None:
        return found
    raise ConfigError(
        Problem(
            field="offload_activations",
            value=value,
            why="not a choice of where the layers' inputs wait",
            remedy="use auto, true or false, or the flag alone for true",
        )
    )
