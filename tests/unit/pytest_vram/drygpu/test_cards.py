"""The card table: names are found as people write them, and every figure says where it was read."""

from __future__ import annotations

import dataclasses

import pytest

from pytest_vram.drygpu.cards import CARDS, Card, context_source, find_card
from pytest_vram.errors import VramUsageError
from pytest_vram.units import GIB

REQUIRED = (
    *("t4", "rtx-3060", "rtx-3080", "rtx-3090", "rtx-4060", "rtx-4060ti-16", "rtx-4070", "rtx-4080", "rtx-4090"),
    *("rtx-5080", "rtx-5090", "l4", "a10g", "l40s", "a100-40", "a100-80", "h100-80", "h200", "b200"),
)


@pytest.mark.parametrize("name", REQUIRED)
def test_every_promised_card_is_there(name: str) -> None:
    assert find_card(name).name == name


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_is_whole(card: Card) -> None:
    assert card.source
    assert card.architecture.max_threads % 512 == 0
    assert 100 << 20 < card.context_bytes < 1 << 30
    assert 7 * GIB < card.total_bytes < 200 * GIB
    assert isinstance(card.total_bytes, int)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("RTX-4080", "rtx-4080"),
        ("rtx_4080", "rtx-4080"),
        ("rtx4080", "rtx-4080"),
        ("RTX 4080", "rtx-4080"),
        ("4080", "rtx-4080"),
        ("dry:rtx-4080", "rtx-4080"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"),
    ],
)
def test_names_are_found_as_people_write_them(written: str, name: str) -> None:
    assert find_card(written).name == name


def test_an_unknown_name_suggests_the_near_ones() -> None:
    with pytest.raises(VramUsageError, match=r"no card 'rtx-4081'.*did you mean rtx-4080"):
        find_card("rtx-4081")


def test_part_of_a_name_suggests_what_contains_it() -> None:
    with pytest.raises(VramUsageError, match=r"a100-40.*a100-80|a100-80.*a100-40"):
        find_card("a100")


def test_a_card_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        find_card("l4").total_bytes = 1  # type: ignore[misc]  # it is frozen, which is tested


def test_a_context_that_was_measured_says_so_and_the_others_name_their_formula() -> None:
    h200 = find_card("h200")
    assert (h200.total_bytes, h200.context_bytes) == (150109880320, 552402944)
    assert "measured on such a card" in context_source(h200)
    assert "per multiprocessor" in context_source(find_card("l4"))


@pytest.mark.parametrize(("name", "gigabytes"), [("t4", 320), ("a100-80", 2039), ("h200", 4917), ("rtx-4090", 1008)])
def test_clocks_and_bus_make_the_bandwidth_of_the_data_sheet(name: str, gigabytes: int) -> None:
    card = find_card(name)
    assert 2 * card.memory_clock_mhz * card.bus_bits / 8 / 1000 == pytest.approx(gigabytes, rel=0.01)
