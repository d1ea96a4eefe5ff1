"""Chooses the split of a step and the layers that recompute: the fastest for which there is room.

The arithmetic says what each choice needs and how long it takes, a trial on the device says whether it fits, and what
the trial measured corrects the arithmetic. Where the arithmetic does not know the model, trials alone decide: first the
largest micro-batch with every layer recomputed, then as few recomputed layers as there is room for.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.config import yaml_file
from finetune.config.recompute import inputs_on_host
from finetune.errors import ConfigError
from finetune.estimate.arithmetic import element_bytes, estimate
from finetune.estimate.sharding import bytes_elsewhere
from finetune.estimate.step_time import step_time

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from finetune.config.settings import RunConfig
    from finetune.estimate.card_speed import CardSpeed

MOST_TRIALS = 5
FIRST_MARGIN = 0.05
"""Share that the first choice leaves free, because a trial that is out of memory does not tell what it needed."""
WORTHWHILE = 0.01
"""Share of a step's time that a choice has to save to be worth another trial."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A split of a step, and how many of the first layers recompute."""

    micro_batch: int
    accumulation: int
    recomputed: int
    layers: int
    """The layers of the model."""
    on_host: bool
    """Whether the inputs of the layers that recompute wait on the host."""

    def at_least(self, other: Choice) -> bool:
        """Return whether this choice needs as much memory as the other one, or more."""
        more = self.micro_batch >= other.micro_batch and self.recomputed <= other.recomputed
        return more and self.on_host <= other.on_host

    @property
    def settings(self) -> dict[str, Any]:
        """The choice as settings of a run."""
        return {
            "micro_batch": self.micro_batch,
            "accumulation": self.accumulation,
            "checkpointing": {0: "none", self.layers: "all"}.get(self.recomputed, self.recomputed),
            "offload_activations": self.on_host and self.recomputed > 0,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What a trial measured."""

    fits: bool
    needed: int
    """Peak bytes, comparable with the budget; meaningless if the trial did not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The result of a search."""

    choice: Choice
    fits: bool
    """Whether a trial of it fitted. If not, it is the leanest choice."""
    needed: int
    """What its trial measured, as in :attr:`Tried.needed`."""
    trials: int


class Forecast:
    """What the arithmetic says of each choice. Bytes are those of PyTorch's allocator, seconds those of a step."""

    def __init__(
        self,
        config: RunConfig,
        shape: Mapping[str, Any],
        speed: CardSpeed,
        *,
        capability: tuple[int, int],
        ranks: int = 1,
    ) -> None:
        self._config, self._shape, self._speed = config, shape, speed
        self._capability, self._ranks = capability, ranks
        self._bytes: dict[Choice, int] = {}
        self._seconds: dict[Choice, float] = {}

    @classmethod
    def of(
        cls,
        config: RunConfig,
        shape: Mapping[str, Any],
        speed: CardSpeed,
        *,
        capability: tuple[int, int],
        ranks: int = 1,
    ) -> Forecast | None:
        """Return the forecast, or None if the arithmetic does not know the model."""
        try:
            estimate(config, shape, capability=capability)
        except (ConfigError, KeyError):
            return None
        return cls(config, shape, speed, capability=capability, ranks=ranks)

    def loaded(self) -> int:
        """Return the estimated bytes of the model and its adapter, which are there before the first step."""
        found = estimate(self._config, self._shape, capability=self._capability)
        adapters = (
            0 if self._config.adapter.full else found.trainable * element_bytes(self._config, self._capability)[2]
        )
        return found.weights + found.quantization + adapters

    def needed(self, choice: Choice) -> int:
        """Return the estimated peak in allocated bytes, on each rank's card."""
        if choice not in self._bytes:
            config = yaml_file.replace(self._config, choice.settings)
            found = estimate(config, self._shape, capability=self._capability)
            elsewhere = bytes_elsewhere(found, config, self._shape, ranks=self._ranks, capability=self._capability)
            self._bytes[choice] = found.allocated_bytes - elsewhere
        return self._bytes[choice]

    def seconds(self, choice: Choice) -> float:
        """Return the estimated seconds of a step."""
        if choice not in self._seconds:
            config = yaml_file.replace(self._config, choice.settings)
            found = step_time(config, self._shape, self._speed, capability=self._capability, ranks=self._ranks)
            self._seconds[choice] = found.seconds
        return self._seconds[choice]


def micro_batches(rows: int, *, processes: int) -> list[int]:
    """Return the micro-batches that divide the rows of a step and leave one for each process; 1 if there are fewer."""
    found = [size for size in range(1, rows + 1) if rows % size == 0 and rows // size >= processes]
    return found or [1]


def choices(
    config: RunConfig, sizes: Sequence[int], recomputed: Sequence[int], layers: int, forecast: Forecast | None
) -> list[list[Choice]]:
    """Return the choices by micro-batch, the largest first, and within one by recomputed layers, the fewest first.

    If the settings leave open where the inputs of the recomputed layers wait, they wait on the host. If that is
    estimated to cost time, the micro-batch has each choice twice, first with the inputs on the card.

    Args:
        config: the settings: the rows of a step, and where inputs wait.
        sizes: the micro-batches, each of which divides the rows.
        recomputed: the numbers of recomputed layers.
        layers: the layers of the model.
        forecast: what the arithmetic says; None if it does not know the model.
    """
    train = config.train
    rows = train.micro_batch * train.accumulation
    on_host = inputs_on_host(train.offload_activations, "cuda", sharded=config.model.shard)

    def those(size: int, on_host: bool) -> list[Choice]:
        return [
            Choice(micro_batch=size, accumulation=rows // size, recomputed=number, layers=layers, on_host=on_host)
            for number in sorted(set(recomputed))
        ]

    found = []
    for size in sorted(set(sizes), reverse=True):
        there, here = those(size, on_host), those(size, False)
        costs = forecast is not None and forecast.seconds(there[-1]) > forecast.seconds(here[-1])
        found += [here, there] if costs and train.offload_activations == "auto" else [there]
    return found


def choose(
    offered: Sequence[Sequence[Choice]],
    budget: int,
    attempt: Callable[[Choice], Tried],
    forecast: Forecast | None,
) -> Chosen:
    """Return the fastest choice that fits, as far as :data:`MOST_TRIALS` trials find it, or else the leanest one.

    Args:
        offered: as :func:`choices` returns them. The last of the last list is the leanest.
        budget: bytes that a choice may need, comparable with :attr:`Tried.needed`.
        attempt: tries a choice on the device.
        forecast: what the arithmetic says; None if it does not know the model.
    """
    search = _Search(offered, attempt)
    if forecast is None:
        return search.by_trials()
    return search.by_forecast(forecast, budget)


def affordable(
    offered: Sequence[Sequence[Choice]], budget: int, forecast: Forecast, extra: float = 0.0
) -> list[Choice]:
    """Return from each list the choice that recomputes least of those that should fit; a list may have none.

    Args:
        offered: as :func:`choices` returns them.
        budget: bytes that a choice may need.
        forecast: what the arithmetic says.
        extra: bytes that a choice needs beyond the forecast.
    """
    room = budget - extra
    found: list[Choice] = []
    for same in offered:  # what a choice needs falls with each layer that recomputes
        first = bisect.bisect_left(same, True, key=lambda one: forecast.needed(one) <= room)
        found += same[first : first + 1]
    return found


class _Search:
    def __init__(self, offered: Sequence[Sequence[Choice]], attempt: Callable[[Choice], Tried]) -> None:
        self._offered, self._attempt = offered, attempt
        self._tried: dict[Choice, Tried] = {}

    def by_forecast(self, forecast: Forecast, budget: int) -> Chosen:
        best: Choice | None = None
        extra = FIRST_MARGIN * budget
        while len(self._tried) < MOST_TRIALS:
            hopeful = [[one for one in same if not self._hopeless(one)] for same in self._offered]
            able = affordable(hopeful, budget, forecast, extra)
            if not able and self._tried:
                break
            # The arithmetic may ask for too much, so that the leanest choice is tried in any case.
            fastest = min(able, key=forecast.seconds) if able else self._offered[-1][-1]
            enough = (1 - WORTHWHILE) * forecast.seconds(best) if best is not None else float("inf")
            # One that was tried is never faster: it is the best, or it was out of memory and is hopeless.
            if forecast.seconds(fastest) >= enough:
                break
            tried = self._try(fastest)
            if tried.fits:
                best, extra = fastest, tried.needed - forecast.needed(fastest)
            else:
                extra = max(extra, budget - forecast.needed(fastest)) + FIRST_MARGIN * budget
        return self._ended(best)

    def by_trials(self) -> Chosen:
        best = next((same[-1] for same in self._offered if self._try(same[-1]).fits), None)
        if best is None:
            return self._ended(None)
        (same,) = (same for same in self._offered if same[-1] == best)
        low, high = -1, len(same) - 1  # `low` does not fit (-1 is never tried), `high` does
        middle = 0  # none recomputes: where a card has room for that, one trial shows it
        for _ in range(MOST_TRIALS - 1):
            if high - low <= 1:
                break
            if self._try(same[middle]).fits:
                high = middle
            else:
                low = middle
            middle = (low + high) // 2
        return self._ended(same[high])

    def _ended(self, best: Choice | None) -> Chosen:
        choice = self._offered[-1][-1] if best is None else best
        tried = self._try(choice)
        return Chosen(choice=choice, fits=tried.fits, needed=tried.needed, trials=len(self._tried))

    def _try(self, choice: Choice) -> Tried:
        if choice not in self._tried:
            self._tried[choice] = self._attempt(choice)
        return self._tried[choice]

    def _hopeless(self, choice: Choice) -> bool:
        """Return whether a choice that needs no more than this one was out of memory."""
        return any(not tried.fits and choice.at_least(other) for other, tried in self._tried.items())
