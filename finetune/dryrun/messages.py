"""The messages between a dry run and the process that takes its steps: a request goes there, a result comes back.

Both processes use these types. :mod:`pytest_vram.memory.codec` converts them to JSON and back; its errors name a field
that is missing or has another type. All sizes are in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from finetune.errors import Problem
from pytest_vram.memory import Holder, HostRead, Note, Phase, Timeline

Settings = dict[str, Any]
"""Settings of a run by name, as JSON can hold them: lists in place of tuples, text in place of paths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request to a trial process."""

    kind: Literal["run", "search"]
    """``run``: take the steps with each of ``changes``. ``search``: find the largest settings that fit."""
    settings: Settings
    """The run's settings. The base model is loaded with them, once."""
    changes: tuple[Settings, ...] = ({},)
    """With ``run``: the settings that each trial changes. Settings of the model may not be among them."""
    over_time: bool = False
    """With ``run``: whether to record memory over time as well."""
    choose: bool = False
    """With ``run``: whether to choose the split and the recomputed layers first, as a run does on its card."""
    open_settings: tuple[str, ...] = ()
    """With ``search``: the settings that may be changed."""
    limit_bytes: int = 0
    """With ``search``: the largest peak on the device that counts as fitting."""
    ranks: int = 1
    """How many processes take the steps together, each on a card of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """Memory over time during a trial, which the HTML page shows beside the trial's figures."""

    timeline: Timeline
    holders: tuple[Holder, ...]
    """The lines of code that held the most at the peak, the largest first."""
    phases: tuple[Phase, ...]
    """The phases of the trial, in the order in which they ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The memory that the steps of a run needed."""

    fits: bool
    """Whether every allocation succeeded."""
    message: str
    """The error of the allocation that failed; empty if none did."""
    phases: dict[str, int]
    """Peak allocated bytes of each phase: loading, adapter, forward and backward, update, evaluation."""
    categories: dict[str, int]
    """Allocated bytes at the peak of the last step by :data:`pytest_vram.memory.timeline.Category`."""
    peak_allocated: int
    peak_reserved: int
    peak_device: int
    """Peak of the reserved bytes, the CUDA context, and any other memory that the driver counts."""
    context: int
    """Memory of the CUDA context, which the driver takes."""
    total: int
    """Memory of the card."""
    managed: int
    """Paged optimizer state. It moves to the host when the card is full, and is not part of ``peak_device``."""
    seconds: float
    """How long the trial took."""
    pinned: int = 0
    """Pinned host memory, the parts of an offloaded base among it; 0 on a real card, where it is not counted."""
    device: str = ""
    """The driver's name for the card."""
    dry: bool = False
    """Whether the card is a dry GPU, on which allocations are real and no kernel runs."""
    host_reads: tuple[HostRead, ...] = ()
    """The reads of values that a dry GPU has not computed. Where it answered with a guess, the figures depend on it."""
    notes: tuple[Note, ...] = ()
    """The assumptions that the dry GPU made in the process of the trial, up to its end."""
    recording: Recording | None = None
    """Memory over time, if it was asked for."""
    rank: int = 0
    """The rank whose memory this is; with several ranks, the one that needs most."""
    by_rank: tuple[Trial, ...] = ()
    """With several ranks: the trials of all ranks that left figures, in the order of their numbers."""
    chosen: Settings | None = None
    """The settings of the split and of the recomputed layers, if the trial was to choose them."""
    note: str = ""
    """How they were chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Settings that a search has found."""

    settings: Settings
    """The settings that the search may change, by name."""
    tokens_per_second: float | None = None
    """The estimated speed; None if the arithmetic does not know the model."""
    needed: int | None = None
    """The estimated peak on the device; None if the arithmetic does not know the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The result of a search."""

    best: Candidate | None
    """The settings that are estimated to be the fastest, of those that fit; None if no settings fit."""
    others: tuple[Candidate, ...] = ()
    """Settings that should fit too, the fastest first. They were not tried."""
    trials: int
    """How many settings were tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The error for which nothing could be measured."""

    kind: Literal["setting", "model", "missing", "data"]
    """``setting``: a setting cannot be used with this model. ``model``: the model cannot be trained. ``missing``: there
    is no model of that name. ``data``: a row of ``--data`` cannot be used."""
    message: str
    problems: tuple[Problem, ...] = ()
    """With ``setting``: each setting that cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The answer of a trial process to a request."""

    trials: tuple[Trial, ...] = ()
    """One trial for each of the request's changes. If the base could not be loaded, one trial, which does not fit."""
    found: Found | None = None
    """The result of a search; None if the base could not be loaded."""
    refusal: Refusal | None = None
    """The error for which nothing could be measured; None if there was none."""
