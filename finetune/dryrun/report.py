"""Presents the result of ``--dry-run`` and ``--fit`` as text, as JSON, and as an HTML page."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.config import yaml_file
from finetune.config.cards import dry_ranks
from finetune.dryrun import assumptions
from finetune.dryrun.card import named_card
from pytest_vram.commands.run_page import held_against_card
from pytest_vram.drygpu.cards import context_caveat, context_notes, context_source
from pytest_vram.memory import Device, Measurement, Peak, Report
from pytest_vram.report import files
from pytest_vram.report.environment import environment
from pytest_vram.units import GIB

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.config.settings import RunConfig
    from finetune.dryrun.messages import Candidate, Found, Trial
    from pytest_vram.memory.device import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The trial of a run on its card and, if that did not fit, on a card with enough memory."""

    trial: Trial
    """The trial on the card itself."""
    roomy: Trial | None = None
    """The same steps on a card of the same kind with enough memory; None if the card itself has enough."""

    @property
    def fits(self) -> bool:
        """Whether the steps ran on the card itself."""
        return self.trial.fits

    @property
    def whole(self) -> Trial:
        """The trial in which all steps were taken, if there is one; else the trial on the card."""
        return self.trial if self.roomy is None else self.roomy

    def chosen_from(self, config: RunConfig) -> RunConfig:
        """Return the settings with the split and the recomputed layers that were chosen for the card, if they were."""
        return yaml_file.replace(config, self.trial.chosen or {})

    @property
    def needed(self) -> int:
        """Peak bytes on the device of the trial that :attr:`whole` returns."""
        return self.whole.peak_device


def render(config: RunConfig, card: str | None, outcome: Outcome) -> str:
    """Return the result as text: whether the run fits, with how much to spare, and what the memory is used for."""
    trial, whole = outcome.trial, outcome.whole
    name = card or trial.device
    ranks = dry_ranks(config)
    if ranks > 1:
        name = f"{ranks} x {name}{', sharded' if config.model.shard else ''}"
    total, verdict = trial.total, "fits" if outcome.fits else "does NOT fit"
    lines = [
        (
            f"{config.model.model} ({config.model.precision}), seq {config.data.seq}, micro-batch"
            f" {config.train.micro_batch}, accumulation {config.train.accumulation}, {config.train.optimizer}:"
            f" {verdict} {name}"
        ),
        (
            f"  needs     {gib(outcome.needed)} of {gib(total)} ({outcome.needed / total:.0%}), the context's"
            f" {gib(trial.context)} included{', on each card' if ranks > 1 else ''}"
        ),
    ]
    if outcome.fits:
        lines.append(f"  headroom  {gib(total - outcome.needed)}")
    else:
        lines.append(
            f"  missing   {gib(outcome.needed - total)}" if outcome.needed > total else "  refused   by fragmentation"
        )
        lines.append(f"  allocator {trial.message.splitlines()[0] if trial.message else ''}")
    if whole.categories:
        lines.append(
            f"  peak      {gib(whole.peak_allocated)} allocated, {gib(whole.peak_reserved)} reserved; in a"
            " step, at its peak:"
        )
        lines += [f"    {size_name:<22}{gib(size)}" for size_name, size in whole.categories.items()]
    if whole.managed:
        lines.append(f"    {'paged optimizer state':<22}{gib(whole.managed)} in managed memory, beside the card's")
    if config.model.offload_base and whole.pinned:
        lines.append(
            f"    {'base on the host':<22}{gib(whole.pinned)} of pinned memory in each rank, other buffers included"
        )
    lines.append("  by phase  " + ", ".join(f"{phase} {gib(size)}" for phase, size in whole.phases.items()))
    if trial.note:
        lines.append(f"  chosen    {trial.note}")
    if card is not None and (caveat := context_caveat(named_card(card))):
        lines.append(f"  context   {caveat}")
    lines += _by_rank(whole)
    lines += [f"  {line}" for line in assumptions.lines(whole)]
    kind = "dry GPU: PyTorch's own allocator, no kernel ran" if trial.dry else "measured on the GPU"
    lines.append(f"  {kind}; {trial.seconds:.1f} s")
    return "\n".join(lines)


def _by_rank(worst: Trial) -> list[str]:
    """Return a line for each rank, the one that needs most first, and how far it is from the mean."""
    ranks = sorted(worst.by_rank, key=lambda trial: (trial.rank != worst.rank, -trial.peak_device))
    if not ranks:
        return []
    lines = [
        f"  rank {trial.rank:<5}{gib(trial.peak_device)} on its card, {gib(trial.peak_reserved)} reserved, "
        f"{gib(trial.peak_allocated)} allocated{', needs most' if trial.rank == worst.rank else ''}"
        for trial in ranks
    ]
    mean = sum(trial.peak_device for trial in ranks) / len(ranks)
    lines.append(f"  imbalance rank {worst.rank} needs {worst.peak_device / mean - 1:.1%} more than the mean")
    return lines


def runners_up(found: Found, ranks: int) -> str:
    """Return the estimated speed of the best settings, and other settings with their estimated speed and memory.

    Args:
        found: what the search found.
        ranks: number of cards that the speed is that of, all together.
    """
    if found.best is None or found.best.tokens_per_second is None:
        return "speed     not estimated: the arithmetic does not know this model. The largest micro-batch comes first"
    together = f"; that of {ranks} cards together, without the time in which they exchange tensors" if ranks > 1 else ""
    lines = [
        f"estimated, from published figures of the card and one profile of an H200; no kernel was timed{together}:",
        f"  these     {_speed(found.best)}",
    ]
    return "\n".join([*lines, *(f"  or        {_speed(one)}" for one in found.others)])


def _speed(candidate: Candidate) -> str:
    named = {name: value for name, value in candidate.settings.items() if name not in ("seq", "rank")}
    speed, needed = candidate.tokens_per_second or 0.0, gib(candidate.needed or 0)
    return f"{speed:8,.0f} tokens/s estimated, {needed} estimated: {yaml_file.as_flags(named)}"


def as_json(command: str, card: str | None, outcome: Outcome) -> str:
    """Return the figures as JSON, in bytes.

    ``fits``, ``total_bytes`` and ``out_of_memory`` describe the trial on the card itself; all other figures are those
    of the trial in which all steps were taken. With several ranks they are those of the rank that needs most, and
    ``ranks`` has the figures of every rank.

    Args:
        command: the command that trains with the settings that were tried.
        card: name of the dry GPU; None for the GPU of this machine.
        outcome: the trials.
    """
    whole = outcome.whole
    figures = {
        "command": command,
        "kind": _kind(whole),
        "chosen": outcome.trial.chosen,
        "gpu": card,
        "count": max(1, len(whole.by_rank)),
        "product": whole.device,
        "fits": outcome.fits,
        "total_bytes": outcome.trial.total,
        **_figures(whole),
        "context_source": None if card is None else context_source(named_card(card)),
        "context_caveat": None if card is None else context_caveat(named_card(card)) or None,
        "out_of_memory": outcome.trial.message or None,
        "notes": [dataclasses.asdict(note) for note in whole.notes],
        "peak_device_spread": None if (bounds := assumptions.spread(whole)) is None else dataclasses.asdict(bounds),
        "host_reads": [dataclasses.asdict(read) for read in whole.host_reads],
        "seconds": whole.seconds,
        "ranks": [{"rank": trial.rank} | _figures(trial) for trial in whole.by_rank],
    }
    return json.dumps(figures, indent=2) + "\n"


def _figures(trial: Trial) -> dict[str, object]:
    return {
        "peak_device_bytes": trial.peak_device,
        "peak_allocated_bytes": trial.peak_allocated,
        "peak_reserved_bytes": trial.peak_reserved,
        "context_bytes": trial.context,
        "managed_bytes": trial.managed,
        "pinned_bytes": trial.pinned,
        "categories": trial.categories,
        "phases": trial.phases,
    }


def save_page(command: str, outcome: Outcome, path: Path) -> None:
    """Write the HTML page: memory over time by category and phase, the lines that held the peak, the card's limit.

    Raises:
        OSError: the file cannot be written.
    """
    files.save(as_report(command, outcome), path)


def as_report(command: str, outcome: Outcome) -> Report:
    """Return the result as a report with one test, measured on the card of each rank."""
    trials = outcome.whole.by_rank or (outcome.whole,)
    devices = tuple(
        Device(kind=_kind(trial), index=trial.rank, name=trial.device, total_bytes=outcome.trial.total)
        for trial in trials
    )
    where = dataclasses.replace(environment(), devices=devices)
    measured = [_measurement(outcome, trial, device) for trial, device in zip(trials, devices, strict=True)]
    return held_against_card(command, measured, where, sound=outcome.fits)


def _kind(trial: Trial) -> Kind:
    return "dry" if trial.dry else "cuda"


def _measurement(outcome: Outcome, trial: Trial, device: Device) -> Measurement:
    recording = trial.recording
    return Measurement(
        device=device,
        peak=Peak(
            allocated_bytes=trial.peak_allocated,
            reserved_bytes=trial.peak_reserved,
            device_bytes=trial.peak_device,
        ),
        phases=recording.phases if recording else (),
        holders=recording.holders if recording else (),
        timeline=recording.timeline if recording else None,
        ooms=int(not outcome.fits),
        host_reads=trial.host_reads,
        notes=(*trial.notes, *(context_notes(trial.device) if trial.dry else ())),
    )


def gib(size: int) -> str:
    """Format bytes as GiB."""
    return f"{size / GIB:.2f} GiB"
