"""What ``--vram-gpu`` and ``vram_ranks`` may be."""

from __future__ import annotations

import pytest

from pytest_vram.errors import VramUsageError
from pytest_vram.probe.select import Choice, parse_choice


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("dry:a100-80x2", Choice(kind="dry", card="a100-80", count=2)),
        ("dry:a100-80 x 4", Choice(kind="dry", card="a100-80", count=4)),
        ("dry:rtx-4080", Choice(kind="dry", card="rtx-4080")),
        ("dry:rtx4080", Choice(kind="dry", card="rtx-4080")),
        ("dry:rtx4080x2", Choice(kind="dry", card="rtx-4080", count=2)),
        ("dry:l4x64", Choice(kind="dry", card="l4", count=64)),
        ("host", Choice(kind="host")),
    ],
)
def test_cards_and_their_number(text: str, choice: Choice) -> None:
    assert parse_choice(text) == choice


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dry:l4x0", "1 to 64"),
        ("dry:l4x65", "1 to 64"),
        ("dry:nonsensex2", "there is no card 'nonsense'"),
        ("cuda:0", "dry:CARDx2 for two of them"),
    ],
)
def test_what_cannot_be(text: str, message: str) -> None:
    with pytest.raises(VramUsageError, match=message):
        parse_choice(text)
