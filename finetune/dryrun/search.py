"""Searches for the settings that train the most tokens a second and fit, and says which others come near.

The speed is estimated, and a trial says what fits: :mod:`finetune.estimate.choice`. The rows of a step stay the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.config import yaml_file
from finetune.config.recompute import layers_recomputed
from finetune.dryrun.messages import Candidate, Found
from finetune.estimate.card_speed import speed_of
from finetune.estimate.choice import Choice, Forecast, Tried, affordable, choices, choose, micro_batches

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from finetune.config.settings import RunConfig
    from finetune.dryrun.trial import Bench

LEAST_RANK, LEAST_SEQ = 4, 128
"""The search does not go below this rank and this length of the sequence."""
SHOWN = 4
"""Other settings that are shown beside the best ones."""
HOPELESS = 1.15
"""Settings that by the arithmetic need more than this share of the limit are not tried. The arithmetic is off by less
(tests hold it to 3%)."""


def search(bench: Bench, config: RunConfig, *, open_settings: Sequence[str], limit_bytes: int, ranks: int = 1) -> Found:
    """Find the settings that are estimated to train the most tokens a second, of those that fit.

    If nothing fits, the search halves the rank, down to :data:`LEAST_RANK`, and then the sequence, down to
    :data:`LEAST_SEQ`, as far as these are open. Settings that by the arithmetic cannot fit are not tried.

    Args:
        bench: a bench whose base is loaded.
        config: the settings that are not searched.
        open_settings: which of micro_batch, seq, checkpointing and rank may be changed. Where the layers' inputs wait
            is open if the settings say ``auto``.
        limit_bytes: the largest peak on the device that counts as fitting.
        ranks: number of ranks that share the micro-batches of a step. Each gets one at least.

    Returns:
        The best settings, and others that should fit. A trial that follows others over one base may need a little more
        than the same trial in a new process, because the allocator's segments are arranged differently. So confirm the
        result in a new process.
    """
    trials = 0
    for leaner in _leaner(config, open_settings):
        level = _Level(bench, leaner, open_settings, limit_bytes, ranks)
        if level.hopeless():
            continue
        chosen = choose(level.offered, level.budget, level.attempt, level.forecast)
        trials += chosen.trials
        if chosen.fits:
            best = level.candidate(chosen.choice)
            return Found(best=best, others=tuple(level.others(chosen.choice)), trials=trials)
    return Found(best=None, trials=trials)


def _leaner(config: RunConfig, open_settings: Sequence[str]) -> Iterator[RunConfig]:
    """Yield the settings, and then ones that need less and less."""
    yield config
    while "rank" in open_settings and not config.adapter.full and config.adapter.rank // 2 >= LEAST_RANK:
        config = yaml_file.replace(config, {"rank": config.adapter.rank // 2})
        yield config
    while "seq" in open_settings and config.data.seq // 2 >= LEAST_SEQ:
        config = yaml_file.replace(config, {"seq": config.data.seq // 2})
        yield config


class _Level:
    """The choices at one rank and one length of the sequence."""

    def __init__(
        self, bench: Bench, config: RunConfig, open_settings: Sequence[str], limit_bytes: int, ranks: int
    ) -> None:
        self._bench, self._config = bench, config
        self.budget = limit_bytes - bench.context_bytes
        train = config.train
        sizes = [train.micro_batch]
        if "micro_batch" in open_settings:
            sizes = micro_batches(train.micro_batch * train.accumulation, processes=ranks)
        layers = max(1, bench.layers)
        recomputed: Sequence[int] = [layers_recomputed(train.checkpointing, layers)]
        if "checkpointing" in open_settings:
            recomputed = range(layers + 1)
        speed = speed_of(bench.product, bench.capability, bench.multiprocessors)
        shape = bench.base.config.to_dict()
        self.forecast = Forecast.of(config, shape, speed, capability=bench.capability, ranks=ranks)
        self.offered = choices(config, sizes, recomputed, layers, self.forecast)
        self._extra: dict[Choice, int] = {}
        self._refused: list[Choice] = []

    def hopeless(self) -> bool:
        """Return whether the arithmetic is sure that not even the leanest choice fits."""
        return self.forecast is not None and self.forecast.needed(self.offered[-1][-1]) > HOPELESS * self.budget

    def attempt(self, choice: Choice) -> Tried:
        trial = self._bench.run(yaml_file.replace(self._config, choice.settings), attributed=False)
        needed = trial.peak_device - self._bench.context_bytes
        if self.forecast is not None:
            self._extra[choice] = needed - self.forecast.needed(choice)
        fits = trial.fits and needed <= self.budget
        if not fits:
            self._refused.append(choice)
        return Tried(fits=fits, needed=needed)

    def candidate(self, choice: Choice, extra: int | None = None) -> Candidate:
        settings = choice.settings | {"rank": self._config.adapter.rank, "seq": self._config.data.seq}
        if self.forecast is None:
            return Candidate(settings=settings)
        tokens = choice.micro_batch * choice.accumulation * self._config.data.seq
        extra = self._extra[choice] if extra is None else extra
        return Candidate(
            settings=settings,
            tokens_per_second=tokens / self.forecast.seconds(choice),
            needed=self.forecast.needed(choice) + extra + self._bench.context_bytes,
        )

    def others(self, best: Choice) -> list[Candidate]:
        """Return other choices that should fit, the fastest first: for each micro-batch the fastest and the leanest."""
        if self.forecast is None:
            return []
        extra = self._extra[best]
        fastest = affordable(self.offered, self.budget, self.forecast, extra)
        leanest = affordable([[same[-1]] for same in self.offered], self.budget, self.forecast, extra)
        able = {one for one in (*fastest, *leanest) if not any(one.at_least(other) for other in self._refused)}
        found = sorted(able - {best}, key=self.forecast.seconds)
        return [self.candidate(choice, extra) for choice in found[:SHOWN]]
