"""What ``--dry-run`` and ``--fit`` found: text, JSON, and the page of a test session."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.dryrun.over_time import Recorded
from pytest_vram.commands.run_page import held_against_card
from pytest_vram.memory import Device, HostRead, Measurement, Peak, Report
from pytest_vram.memory.codec import decode
from pytest_vram.report import files
from pytest_vram.report.environment import environment

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from finetune.config.settings import RunConfig
    from pytest_vram.memory.device import Kind

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One trial, as the user is told of it."""

    trial: dict[str, Any]
    roomy: dict[str, Any] | None = None
    """The same steps on a card of the same kind with enough memory, where this one has not."""

    @property
    def fits(self) -> bool:
        """Whether it ran on the card itself."""
        return bool(self.trial["fits"])

    @property
    def whole(self) -> dict[str, Any]:
        """The trial that came to its end, if any did."""
        return self.trial if self.roomy is None else self.roomy

    @property
    def needed(self) -> int:
        """Peak bytes on the device."""
        return int(self.whole["peak_device"])


def render(config: RunConfig, card: str | None, answer: Answer) -> str:
    """The answer for people: fits or not, by how much, and where the memory goes."""
    trial, whole = answer.trial, answer.whole
    name = card or trial["device"]
    total, verdict = trial["total"], "fits" if answer.fits else "does NOT fit"
    lines = [
        (
            f"{config.model.model} ({config.model.precision}), seq {config.data.seq}, micro-batch"
            f" {config.train.micro_batch}, accumulation {config.train.accumulation}, {config.train.optimizer}:"
            f" {verdict} {name}"
        ),
        (
            f"  needs     {gib(answer.needed)} of {gib(total)} ({answer.needed / total:.0%}), the context's"
            f" {gib(trial['context'])} included"
        ),
    ]
    if answer.fits:
        lines.append(f"  headroom  {gib(total - answer.needed)}")
    else:
        lines.append(
            f"  missing   {gib(answer.needed - total)}" if answer.needed > total else "  refused   by fragmentation"
        )
        lines.append(f"  allocator {trial['message'].splitlines()[0] if trial['message'] else ''}")
    if whole["categories"]:
        lines.append(
            f"  peak      {gib(whole['peak_allocated'])} allocated, {gib(whole['peak_reserved'])} reserved; in a"
            " step, at its peak:"
        )
        lines += [f"    {size_name:<22}{gib(size)}" for size_name, size in whole["categories"].items()]
    if whole["managed"]:
        lines.append(f"    {'paged optimizer state':<22}{gib(whole['managed'])} in managed memory, beside the card's")
    lines.append("  by phase  " + ", ".join(f"{phase} {gib(size)}" for phase, size in whole["phases"].items()))
    lines += [f"  rests on  {note}" for note in _guesses(whole)]
    kind = "dry GPU: PyTorch's own allocator, no kernel ran" if trial["dry"] else "measured on the GPU"
    lines.append(f"  {kind}; {trial['seconds']:.1f} s")
    return "\n".join(lines)


def _guesses(trial: dict[str, Any]) -> list[str]:
    """What was assumed where a value decides that a dry GPU has not computed: a mixture's router, for example."""
    notes = (read["note"].partition("; ")[0] for read in trial["host_reads"])
    return list(dict.fromkeys(note for note in notes if " taken as " in note))


def as_json(command: str, card: str | None, answer: Answer) -> str:
    """The figures of the steps that came to their end, in bytes; ``fits`` is about the card itself.

    Args:
        command: that trains with the settings that were tried.
        card: of the dry GPU; ``None`` for this machine's own.
        answer: what was found.
    """
    whole = answer.whole
    figures = {
        "command": command,
        "kind": _kind(whole),
        "gpu": card,
        "product": whole["device"],
        "fits": answer.fits,
        "total_bytes": answer.trial["total"],
        "peak_device_bytes": whole["peak_device"],
        "peak_allocated_bytes": whole["peak_allocated"],
        "peak_reserved_bytes": whole["peak_reserved"],
        "context_bytes": whole["context"],
        "managed_bytes": whole["managed"],
        "categories": whole["categories"],
        "phases": whole["phases"],
        "out_of_memory": answer.trial["message"] or None,
        "host_reads": whole["host_reads"],
        "seconds": whole["seconds"],
    }
    return json.dumps(figures, indent=2) + "\n"


def save_page(command: str, answer: Answer, path: Path) -> None:
    """Write the page: memory over time, its parts and phases, the lines that held the peak, and the card's limit.

    Raises:
        OSError: it cannot be written.
    """
    files.save(as_report(command, answer), path)


def as_report(command: str, answer: Answer) -> Report:
    """The answer as a report with one test, named by its command; its budget is the card's memory."""
    whole = answer.whole
    device = Device(kind=_kind(whole), index=0, name=whole["device"], total_bytes=answer.trial["total"])
    where = dataclasses.replace(environment(), devices=(device,))
    return held_against_card(command, [_measurement(answer, device)], where, sound=answer.fits)


def _kind(trial: Mapping[str, Any]) -> Kind:
    return "dry" if trial["dry"] else "cuda"


def _measurement(answer: Answer, device: Device) -> Measurement:
    whole = answer.whole
    recorded = decode(Recorded, whole["recorded"])
    return Measurement(
        device=device,
        peak=Peak(
            allocated_bytes=whole["peak_allocated"],
            reserved_bytes=whole["peak_reserved"],
            device_bytes=whole["peak_device"],
        ),
        phases=recorded.phases,
        holders=recorded.holders,
        timeline=recorded.timeline,
        ooms=int(not answer.fits),
        host_reads=tuple(decode(HostRead, read) for read in whole["host_reads"]),
    )


def gib(size: int) -> str:
    """Bytes as text, in GiB."""
    return f"{size / GIB:.2f} GiB"
