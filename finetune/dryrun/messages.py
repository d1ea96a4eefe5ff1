"""What crosses the border between a dry run and the process that takes its steps: requests there, results back.

Both sides use these types; :mod:`pytest_vram.memory.codec` turns them into JSON and back, and names a field that is
missing or of another type. Sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from finetune.errors import Problem
from pytest_vram.memory import Holder, HostRead, Phase, Timeline

Settings = dict[str, Any]
"""Settings of a run by their flat names, as JSON keeps them: lists for tuples, text for paths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a trial process is asked to do."""

    kind: Literal["run", "search"]
    """``run``: take the steps of every change. ``search``: find the largest setting that fits."""
    settings: Settings
    """The run's own settings; the base model is loaded with them, once."""
    changes: tuple[Settings, ...] = ({},)
    """Of ``run``: what each trial changes. No setting of the model is among them."""
    over_time: bool = False
    """Of ``run``: record memory over time as well."""
    open_settings: tuple[str, ...] = ()
    """Of ``search``: the settings that may be changed."""
    limit_bytes: int = 0
    """Of ``search``: the most that the peak on the device may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What a page shows of a trial beside its figures."""

    timeline: Timeline
    holders: tuple[Holder, ...]
    """The lines that held most at the peak, the largest first."""
    phases: tuple[Phase, ...]
    """In the order in which they ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What the steps of a run needed."""

    fits: bool
    """Whether every allocation was granted."""
    message: str
    """The allocator's own message, when it refused one."""
    phases: dict[str, int]
    """Peak allocated bytes of loading, adapter, forward and backward, update, evaluation."""
    categories: dict[str, int]
    """Allocated bytes at the peak of the last step by :data:`pytest_vram.memory.timeline.Category`."""
    peak_allocated: int
    peak_reserved: int
    peak_device: int
    """Reserved bytes, the context, and whatever else the driver counts."""
    context: int
    """Memory that the driver takes for itself."""
    total: int
    """Memory of the card."""
    managed: int
    """Paged optimizer state. It moves to the host when the card is full, and is not part of ``peak_device``."""
    seconds: float
    device: str = ""
    """What the driver calls the card."""
    dry: bool = False
    """Whether the card is a dry GPU, on which only allocations are real."""
    host_reads: tuple[HostRead, ...] = ()
    """Where a dry GPU was asked for values; the figures rest on the answers that are guesses."""
    recording: Recording | None = None
    """Memory over time, where it was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Settings that a search tried, and what they needed."""

    micro_batch: int
    seq: int
    checkpointing: bool
    rank: int
    trial: Trial

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.micro_batch * self.seq

    @property
    def settings(self) -> Settings:
        """The settings alone, by name."""
        return {name: getattr(self, name) for name in ("micro_batch", "seq", "checkpointing", "rank")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search found."""

    best: Candidate | None
    """The most tokens that fit; None where nothing does."""
    next: Candidate | None = None
    """The next larger setting, which does not fit; None where there is none."""
    trials: int
    """How many settings were tried."""
    direction: str | None = None
    """Which setting was raised to get there, ``micro_batch`` or ``seq``; None where neither might be changed."""
    step: int = 1
    """The distance between two values of that setting."""
    most: int = 0
    """Its largest value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a trial cannot be taken."""

    kind: Literal["setting", "model", "missing", "data"]
    """A setting that the model rules out, a model that cannot be trained, an unknown name, or a row of ``--data``."""
    message: str
    problems: tuple[Problem, ...] = ()
    """Of ``setting``: each setting that cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a trial process answers."""

    trials: tuple[Trial, ...] = ()
    """One for each change of the request; a single one, which does not fit, when the base could not be loaded."""
    found: Found | None = None
    """The result of a search whose base could be loaded."""
    refusal: Refusal | None = None
    """Why nothing could be measured."""
