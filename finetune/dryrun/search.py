"""The most tokens a step that fit: guessed by arithmetic, corrected by each trial, held between one and the next."""

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
"""Sequence lengths are searched in steps of so many tokens."""
MOST_ROWS = 4096
_MOST_TRIALS = 8


@dataclass(slots=True)
class _Progress:
    """What a search has found so far."""

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
    """Find the largest setting that fits, and the next larger one, which does not.

    With both ``micro_batch`` and ``seq`` open, both directions are searched from the defaults, and the one with more
    tokens wins. Where nothing fits, ``rank`` is halved if it is open.

    Args:
        bench: with the base loaded.
        config: the fixed settings.
        open_settings: which of micro_batch, seq, checkpointing and rank may be changed.
        limit_bytes: what the peak on the device must not pass.

    Returns:
        The best setting and the next larger one. A trial that follows others over one base may need a little more
        than the same trial in a fresh process, because the allocator's segments lie differently: confirm the result
        there, and try larger settings from it on.
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
    """Find the largest value of one setting, and keep it if it takes more tokens than what was found before."""
    step = SEQ_STEP if name == "seq" else 1
    most = _longest(bench) // step if name == "seq" else MOST_ROWS
    trials: dict[int, Trial] = {}

    def trial(units: int) -> Trial:
        if units not in trials:
            trials[units] = bench.run(yaml_file.replace(config, {name: units * step}), attributed=False)
            progress.trials += 1
        return trials[units]

    low, high = 0, most + 1  # low fits, high does not
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
    """What a setting needs by arithmetic; None for a family of models that the arithmetic does not know."""
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
    """The largest setting that should fit: by arithmetic, set right by the largest trial that ran to its end.

    Without arithmetic, where a line through the two largest trials meets the limit. A guess that holds leaves its
    neighbour, and that one ends the search.
    """
    whole = sorted(units for units, trial in trials.items() if trial.fits)
    if not whole and trials:
        guess = high // 2  # refused, so far, whatever was tried: no telling how far off
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
        guess = (low + high) // 2  # contradicted twice
    return min(max(guess, low + 1), high - 1)


def _corrected(forecast: Callable[[int], int], trials: dict[int, Trial], whole: list[int]) -> Callable[[int], int]:
    """The forecast, moved through the largest trial and tilted through the one before it."""
    if not whole:
        # The first guess is to fall a little short: a trial that is refused tells nothing of what it needed.
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
