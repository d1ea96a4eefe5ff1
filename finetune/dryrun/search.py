"""The most tokens a step that fit: guessed by arithmetic, corrected by each trial, held between one and the next."""

from __future__ import annotations

import bisect
import dataclasses
from typing import TYPE_CHECKING, Any

from finetune.config import yaml_file
from finetune.errors import ConfigError
from finetune.estimate.arithmetic import estimate

if TYPE_CHECKING:
    from collections.abc import Callable

    from finetune.config.settings import RunConfig
    from finetune.dryrun.trial import Bench, Trial

SEQ_STEP = 256
"""Sequence lengths are searched in steps of so many tokens."""
MOST_ROWS = 4096
_MOST_TRIALS = 8


def search(bench: Bench, config: RunConfig, *, open_settings: list[str], limit_bytes: int) -> dict[str, Any]:
    """Find the largest setting that fits, and the next larger one, which does not.

    With both ``micro_batch`` and ``seq`` open, both directions are searched from the defaults, and the one with more
    tokens wins. Where nothing fits, ``rank`` is halved if it is open.

    Args:
        bench: with the base loaded.
        config: the fixed settings.
        open_settings: which of micro_batch, seq, checkpointing and rank may be changed.
        limit_bytes: what the peak on the device must not pass.

    Returns:
        ``best`` (settings that differ from ``config``, and the trial) and ``next``; ``best`` is ``None`` where
        nothing fits. Where micro-batch or seq was searched, ``name`` says which won, in steps of ``step`` and up to
        ``most``. A trial after others may need a little more than one in a fresh process, for the allocator's segments
        lie differently: who must be exact looks there, from here on up.
    """
    if "checkpointing" in open_settings:
        config = yaml_file.replace(config, {"checkpointing": True})
    found: dict[str, Any] = {"best": None, "next": None, "trials": 0}
    while True:
        for direction in ("micro_batch", "seq"):
            if direction in open_settings:
                _climb(bench, config, direction, limit_bytes, found)
        if not {"micro_batch", "seq"} & set(open_settings):
            trial = bench.run(config, attributed=False)
            if _fits(trial, limit_bytes):
                found["best"] = _entry(config, trial)
        if found["best"] is not None or "rank" not in open_settings or config.adapter.rank <= 4:
            return found
        config = yaml_file.replace(config, {"rank": config.adapter.rank // 2})


def _climb(bench: Bench, config: RunConfig, name: str, limit_bytes: int, found: dict[str, Any]) -> None:
    """The largest value of one setting."""
    step = SEQ_STEP if name == "seq" else 1
    most = _longest(bench) // step if name == "seq" else MOST_ROWS
    trials: dict[int, Trial] = {}

    def trial(units: int) -> Trial:
        if units not in trials:
            trials[units] = bench.run(yaml_file.replace(config, {name: units * step}), attributed=False)
            found["trials"] += 1
        return trials[units]

    low, high = 0, most + 1  # low fits, high does not
    forecast = _forecast(bench, config, name, step)
    while high - low > 1:
        guess = _next_guess(trials, low, high, limit_bytes, forecast)
        if _fits(trial(guess), limit_bytes):
            low = guess
        else:
            high = guess
    if low and (found["best"] is None or low * step * _other(config, name) > found["best"]["tokens"]):
        found["best"] = _entry(yaml_file.replace(config, {name: low * step}), trial(low))
        found["next"] = None
        found["name"], found["step"], found["most"] = name, step, most * step
        if low < most:
            larger = yaml_file.replace(config, {name: (low + 1) * step})
            found["next"] = _entry(larger, trial(low + 1))


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


def _entry(config: RunConfig, trial: Trial) -> dict[str, Any]:
    return {
        "settings": {
            "micro_batch": config.train.micro_batch,
            "seq": config.data.seq,
            "checkpointing": config.train.checkpointing,
            "rank": config.adapter.rank,
        },
        "tokens": config.train.micro_batch * config.data.seq,
        "trial": dataclasses.asdict(trial),
    }
