"""The choice of a split and of recomputed layers, on cards whose memory follows a formula."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from finetune.config import yaml_file
from finetune.config.settings import DEMO, RunConfig
from finetune.estimate.card_speed import speed_of
from finetune.estimate.choice import MOST_TRIALS, Choice, Forecast, Tried, choices, choose, micro_batches
from finetune.model.shapes import SHAPES
from pytest_vram.drygpu import find_card

GIB = 2**30
CARD = find_card("rtx-4080")
SHAPE = SHAPES["mistral-7b"].fields()
LAYERS, ROWS = 32, 16
SIZES = [1, 2, 4, 8, 16]
LAUNCHING: dict[str, Any] = {"seq": 16, "precision": "bf16"}


@functools.cache
def forecast(**settings: Any) -> Forecast:
    config = yaml_file.replace(RunConfig(), {"model": "mistral-7b", "device": "cuda", "seq": 512} | settings)
    speed = speed_of(CARD.product, CARD.capability, CARD.multiprocessors)
    found = Forecast.of(config, SHAPE, speed, capability=CARD.capability)
    assert found is not None
    return found


def offered(*recomputed: int, known: bool = True, **settings: Any) -> list[list[Choice]]:
    config = yaml_file.replace(RunConfig(), {"accumulation": ROWS} | settings)
    return choices(config, SIZES, recomputed or range(LAYERS + 1), LAYERS, forecast(**settings) if known else None)


OFFERED = offered()


class Card:
    """Needs as much as the arithmetic says, times a factor, and says what it needed where that fits."""

    def __init__(self, budget: int, needed: Forecast, factor: float = 1.0) -> None:
        self.budget, self.forecast, self.factor = budget, needed, factor
        self.tried: list[Choice] = []

    def needs(self, choice: Choice) -> int:
        return round(self.factor * self.forecast.needed(choice))

    def __call__(self, choice: Choice) -> Tried:
        self.tried.append(choice)
        fits = self.needs(choice) <= self.budget
        return Tried(fits=fits, needed=self.needs(choice) if fits else self.budget)


def fastest_that_fits(card: Card) -> float:
    found = [card.forecast.seconds(one) for same in OFFERED for one in same if card.needs(one) <= card.budget]
    return min(found)


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1])
@pytest.mark.parametrize("gib", [5, 6, 8, 11, 15, 30, 100])
def test_it_comes_near_the_fastest_that_fits_whatever_the_arithmetic_is_off_by(gib: int, factor: float) -> None:
    card = Card(gib * GIB, forecast(), factor)
    found = choose(OFFERED, card.budget, card, card.forecast)
    assert found.fits
    assert card.needs(found.choice) <= card.budget
    assert card.forecast.seconds(found.choice) <= 1.05 * fastest_that_fits(card)
    assert found.trials == len(card.tried) == len(set(card.tried)) <= MOST_TRIALS


def test_where_everything_fits_one_trial_shows_it_and_nothing_recomputes() -> None:
    card = Card(200 * GIB, forecast())
    found = choose(OFFERED, card.budget, card, card.forecast)
    assert (found.choice.micro_batch, found.choice.recomputed, found.trials) == (16, 0, 1)
    assert found.choice.settings == {
        "micro_batch": 16,
        "accumulation": 1,
        "checkpointing": "none",
        "offload_activations": False,
    }


@pytest.mark.parametrize("known", [True, False])
def test_where_nothing_fits_the_leanest_is_told_not_to(known: bool) -> None:
    card = Card(1 * GIB, forecast())
    found = choose(OFFERED, card.budget, card, card.forecast if known else None)
    assert not found.fits
    assert found.choice.settings == {
        "micro_batch": 1,
        "accumulation": 16,
        "checkpointing": "all",
        "offload_activations": True,
    }


@pytest.mark.parametrize("gib", [5, 8, 11, 15, 100])
def test_without_arithmetic_trials_decide_the_micro_batch_first(gib: int) -> None:
    card = Card(gib * GIB, forecast())
    found = choose(OFFERED, card.budget, card, None)
    largest = next(same for same in OFFERED if card.needs(same[-1]) <= card.budget)
    assert found.fits
    assert found.choice in largest
    assert card.needs(found.choice) <= card.budget
    least = next(one.recomputed for one in largest if card.needs(one) <= card.budget)
    assert least <= found.choice.recomputed <= least + 4  # of 32: four halvings


def test_a_given_number_of_layers_is_the_only_one_tried() -> None:
    card = Card(8 * GIB, forecast())
    found = choose(offered(10), card.budget, card, card.forecast)
    assert found.choice.recomputed == 10
    assert {one.recomputed for one in card.tried} == {10}


def test_a_family_that_the_arithmetic_does_not_know_has_no_forecast() -> None:
    speed = speed_of(CARD.product, CARD.capability, CARD.multiprocessors)
    assert Forecast.of(RunConfig(), {"model_type": "unheard-of"}, speed, capability=(8, 9)) is None


def test_what_is_loaded_is_the_base_and_its_adapter() -> None:
    found = forecast()
    assert 3.6 * GIB < found.loaded() < 4.2 * GIB
    assert forecast(rank=256).loaded() - found.loaded() == 240 * 41_943_040 // 16 * 2


def places(lists: list[list[Choice]]) -> list[tuple[int, bool]]:
    return [(same[0].micro_batch, same[0].on_host) for same in lists]


def test_inputs_wait_on_the_host_where_that_costs_nothing_or_is_not_known_to() -> None:
    """A layer of 7 billion parameters takes longer than the copy of its input, whatever the rows."""
    assert places(OFFERED) == [(size, True) for size in reversed(SIZES)]
    assert places(offered(known=False)) == places(OFFERED)


def test_where_copies_cost_time_both_places_are_offered_and_the_leanest_comes_last() -> None:
    """In rows of 16 tokens a micro-batch of one waits for the host that launches."""
    found = places(offered(**LAUNCHING))
    assert found[-2:] == [(1, False), (1, True)]
    leanest = [same[-1:] for same in offered(**LAUNCHING)][-2:]
    for room in (True, False):
        tried: list[bool] = []

        def attempt(choice: Choice, room: bool = room, tried: list[bool] = tried) -> Tried:
            tried.append(choice.on_host)
            return Tried(fits=room or choice.on_host, needed=GIB)

        chosen = choose(leanest, 200 * GIB, attempt, forecast(**LAUNCHING))
        assert (chosen.fits, chosen.choice.on_host) == (True, not room)
        assert tried == [False] + [True] * (not room)


@pytest.mark.parametrize("given", [True, False])
def test_a_given_place_is_the_only_one_offered(given: bool) -> None:
    assert places(offered(**LAUNCHING, offload_activations=given)) == [(size, given) for size in reversed(SIZES)]


def test_more_layers_keep_their_activations_where_inputs_wait_on_the_host() -> None:
    found = []
    for on_host in (False, True):
        card = Card(8 * GIB, forecast(seq=4096, offload_activations=on_host))
        lists = offered(seq=4096, offload_activations=on_host)
        found.append(choose([lists[-1]], card.budget, card, card.forecast).choice.recomputed)
    assert found[1] < found[0]


def test_micro_batches_divide_the_rows_and_leave_one_for_each_process() -> None:
    assert micro_batches(12, processes=1) == [1, 2, 3, 4, 6, 12]
    assert micro_batches(12, processes=4) == [1, 2, 3]
    assert micro_batches(2, processes=4) == [1]


@pytest.mark.parametrize("card", ["h200", "h100-80", "rtx-4080", "t4"])
def test_a_card_computes_the_rows_of_a_step_of_the_demo_at_once(card: str) -> None:
    """The demo splits its eight rows for two cores. On a card each micro-batch would wait for its launches."""
    there = find_card(card)
    speed = speed_of(there.product, there.capability, there.multiprocessors)
    config = yaml_file.replace(DEMO, {"device": "cuda"})
    found = Forecast.of(config, SHAPES["smollm2-135m"].fields(), speed, capability=there.capability)
    assert found is not None
    rows = DEMO.train.micro_batch * DEMO.train.accumulation
    assert DEMO.train.split == "auto"
    assert DEMO.train.accumulation > 1
    of_sizes = choices(config, micro_batches(rows, processes=1), [0], 30, found)
    budget = there.total_bytes - there.context_bytes
    chosen = choose(of_sizes, budget, Card(budget, found), found).choice
    assert (chosen.micro_batch, chosen.accumulation) == (rows, 1)
