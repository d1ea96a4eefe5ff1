"""Finds the card of a dry run by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.errors import ConfigError, Problem

if TYPE_CHECKING:
    from pytest_vram.drygpu import Card


def named_card(name: str) -> Card:
    """Find a card in the card table.

    Raises:
        ConfigError: there is no card of that name; the message lists cards with a similar name.
    """
    from pytest_vram.drygpu import find_card
    from pytest_vram.errors import VramError

    try:
        return find_card(name)
    except VramError as error:
        remedy = "`python -m pytest_vram cards` lists them"
        raise ConfigError(Problem(field="gpu", value=name, why=str(error), remedy=remedy)) from error
