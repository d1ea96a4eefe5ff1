"""Searches for the settings that train the most tokens per step and fit.

The arithmetic guesses a value, a trial measures it, and the measurement corrects the next guess. The search ends when
one value fits and the next larger one does not.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.config import yaml_file
from finetune.dryrun.messages import Candidate, Found
from finetune.errors import ConfigError
from finetune.estimate.arithmetic import estimate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from finetune.config.settings import RunConfig
    from finetune.dryrun.messages import Trial
    from finetune.dryrun.trial import Bench

SEQ_STEP = 256
"""The search tries sequence lengths that are a multiple of this number of tokens."""
MOST_ROWS = 4096


@dataclass(slots=True)
class _Progress:
    """The result of a search so far, with the fields of :class:`Found`."""

    best: Candidate | None = None
    next: Candidate | None = None
    trials: int = 0
    direction: str | None = None
    step: int = 1
    most: int = 0

    def found(self) -> Found:
        return Found(
            best=self.best,
            next=self.next,
            trials=self.trials,
            direction=self.direction,
            step=self.step,
            most=self.most,
        )


def search(bench: Bench, config: RunConfig, *, open_settings: Sequence[str], limit_bytes: int) -> Found:
    """Find the largest settings that fit, and the next larger ones, which do not.

    If both ``micro_batch`` and ``seq`` are open, the search raises one and then the other, each from the defaults, and
    takes the result with more tokens. If nothing fits and ``rank`` is open, it halves the rank and tries again.

    Args:
        bench: a bench whose base is loaded.
        config: the settings that are not searched.
        open_settings: which of micro_batch, seq, checkpointing and rank may be changed.
        limit_bytes: the largest peak on the device that counts as fitting.

    Returns:
        The best settings and the next larger ones. A trial that follows others over one base may need a little more
        than the same trial in a new process, because the allocator's segments are arranged differently. So confirm the
        result in new processes, and try larger settings there.
    """
    if "checkpointing" in open_settings:
        config = yaml_file.replace(config, {"checkpointing": True})
    progress = _Progress()
    while True:
        for direction in ("micro_batch", "seq"):
            if direction in open_settings:
                _climb(bench, config, direction, limit_bytes, progress)
        if not {"micro_batch", "seq"} & set(open_settings):
            trial = bench.run(config, attributed=False)
            if _fits(trial, limit_bytes):
                progress.best = _candidate(config, trial)
        if progress.best is not None or "rank" not in open_settings or config.adapter.rank <= 4:
            return progress.found()
        config = yaml_file.replace(config, {"rank": config.adapter.rank // 2})


def _climb(bench: Bench, config: RunConfig, name: str, limit_bytes: int, progress: _Progress) -> None:
    """Find the largest value of one setting that fits, and keep it if it has more tokens than the best so far."""
    step = SEQ_STEP if name == "seq" else 1
    most = _longest(bench) // step if name == "seq" else MOST_ROWS
    trials: dict[int, Trial] = {}

    def trial(units: int) -> Trial:
        if units not in trials:
            trials[units] = bench.run(yaml_file.replace(config, {name: units * step}), attributed=False)
            progress.trials += 1
        return trials[units]

    low, high = 0, most + 1  # `low` fits (0 is never tried), `high` does not
    forecast = _forecast(bench, config, name, step)
    while high - low > 1:
        guess = _next_guess(trials, low, high, limit_bytes, forecast)
        if _fits(trial(guess), limit_bytes):
            low = guess
        else:
            high = guess
    if low and (progress.best is None or low * step * _other(config, name) > progress.best.tokens):
        progress.best = _candidate(yaml_file.replace(config, {name: low * step}), trial(low))
        progress.next = None
        progress.direction, progress.step, progress.most = name, step, most * step
        if low < most:
            larger = yaml_file.replace(config, {name: (low + 1) * step})
            progress.next = _candidate(larger, trial(low + 1))


def _forecast(bench: Bench, config: RunConfig, name: str, step: int) -> Callable[[int], int] | None:
    """Return a function that computes the bytes a setting needs; None if the arithmetic does not know the model."""
    shape = bench.base.config.to_dict()

    def needs(units: int) -> int:
        changed = yaml_file.replace(config, {name: units * step})
        return estimate(changed, shape, capability=bench.capability, context_bytes=bench.context_bytes).total_bytes

    try:
        needs(1)
    except (ConfigError, KeyError):
        return None
    return needs


def _next_guess(
    trials: dict[int, Trial], low: int, high: int, limit_bytes: int, forecast: Callable[[int], int] | None
) -> int:
    """Return the value to try next: the largest one between ``low`` and ``high`` that should fit.

    The arithmetic gives it, corrected by the trials that ran to their end. Without arithmetic, it is the value at which
    a line through the two largest of those trials reaches the limit.

    Args:
        trials: the trials so far, by value.
        low: the largest value that fits.
        high: the smallest value that does not fit.
        limit_bytes: the largest peak on the device that counts as fitting.
        forecast: bytes by value, from the arithmetic; None if it does not know the model.
    """
    whole = sorted(units for units, trial in trials.items() if trial.fits)
    if not whole and trials:
        guess = high // 2  # every trial was out of memory, which does not tell by how much
    elif forecast is not None:
        guess = bisect.bisect_right(range(high), limit_bytes, lo=1, key=_corrected(forecast, trials, whole)) - 1
    elif len(whole) >= 2:
        a, b = whole[-2:]
        slope = (trials[b].peak_device - trials[a].peak_device) / (b - a)
        guess = b + int((limit_bytes - trials[b].peak_device) // slope) if slope > 0 else high - 1
    else:
        guess = max(1, 2 * low)
    refused = sum(units >= high for units in trials)
    if refused > 1 and guess >= high - 1:
        guess = (low + high) // 2  # two guesses were too large already: halve the interval instead
    return min(max(guess, low + 1), high - 1)


def _corrected(forecast: Callable[[int], int], trials: dict[int, Trial], whole: list[int]) -> Callable[[int], int]:
    """Return the forecast, shifted to meet the largest trial, and scaled to meet the one before it as well."""
    if not whole:
        # The first guess should be a little too small: a trial that is out of memory does not tell what it needed.
        return lambda units: round(forecast(units) / 0.95)
    last = whole[-1]
    tilt = 1.0
    if len(whole) >= 2:
        before = whole[-2]
        expected = forecast(last) - forecast(before)
        tilt = (trials[last].peak_device - trials[before].peak_device) / expected if expected > 0 else 1.0
    return lambda units: trials[last].peak_device + round(max(tilt, 0.01) * (forecast(units) - forecast(last)))


def _fits(trial: Trial, limit_bytes: int) -> bool:
    return trial.fits and trial.peak_device <= limit_bytes


def _other(config: RunConfig, name: str) -> int:
    return config.train.micro_batch if name == "seq" else config.data.seq


def _longest(bench: Bench) -> int:
    return int(bench.base.config.get_text_config().max_position_embeddings)


def _candidate(config: RunConfig, trial: Trial) -> Candidate:
    return Candidate(
        micro_batch=config.train.micro_batch,
        seq=config.data.seq,
        checkpointing=config.train.checkpointing,
        rank=config.adapter.rank,
        trial=trial,
    )
