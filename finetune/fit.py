"""The most tokens a step that fit: micro-batch or sequence, by a line through two measurements, then checked."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from finetune import configfile

if TYPE_CHECKING:
    from finetune.config import RunConfig
    from finetune.trial import Bench, Trial

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
        nothing fits.
    """
    if "checkpointing" in open_settings:
        config = configfile.replace(config, {"checkpointing": True})
    found: dict[str, Any] = {"best": None, "next": None, "trials": 0}
    while True:
        for direction in ("micro_batch", "seq"):
            if direction in open_settings:
                _climb(bench, config, direction, limit_bytes, found)
        if not {"micro_batch", "seq"} & set(open_settings):
            trial = bench.run(config)
            if _fits(trial, limit_bytes):
                found["best"] = _entry(config, trial)
        if found["best"] is not None or "rank" not in open_settings or config.adapter.rank <= 4:
            return found
        config = configfile.replace(config, {"rank": config.adapter.rank // 2})


def _climb(bench: Bench, config: RunConfig, name: str, limit_bytes: int, found: dict[str, Any]) -> None:
    """The largest value of one setting."""
    step = SEQ_STEP if name == "seq" else 1
    most = _longest(bench) // step if name == "seq" else MOST_ROWS
    trials: dict[int, Trial] = {}

    def trial(units: int) -> Trial:
        if units not in trials:
            trials[units] = bench.run(configfile.replace(config, {name: units * step}))
            found["trials"] += 1
        return trials[units]

    low, high = 0, most + 1  # low fits, high does not
    guess = 2 if name == "seq" else 1
    while high - low > 1 and len(trials) < _MOST_TRIALS:
        if _fits(trial(guess), limit_bytes):
            low = guess
        else:
            high = guess
        guess = _next_guess(trials, low, high, limit_bytes)
    if low and (found["best"] is None or low * step * _other(config, name) > found["best"]["tokens"]):
        found["best"] = _entry(configfile.replace(config, {name: low * step}), trial(low))
        found["next"] = None
        if low < most:
            larger = configfile.replace(config, {name: (low + 1) * step})
            found["next"] = _entry(larger, trial(low + 1))


def _next_guess(trials: dict[int, Trial], low: int, high: int, limit_bytes: int) -> int:
    """Where a line through the two largest trials that ran to their end meets the limit; else the middle."""
    whole = sorted(units for units, t in trials.items() if t.fits)
    guess = (low + high) // 2 if high - low < 2 * low else min(2 * max(low, 1), high - 1)
    if len(whole) >= 2:
        a, b = whole[-2:]
        slope = (trials[b].peak_device - trials[a].peak_device) / (b - a)
        if slope > 0:
            guess = b + int((limit_bytes - trials[b].peak_device) // slope)
    guess = min(max(guess, low + 1), high - 1)
    # A guess that was right twice over leaves its neighbour to be tried.
    return guess if guess not in trials else min(max(low + 1, guess + 1), high - 1)


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
