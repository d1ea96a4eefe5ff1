"""The messages that a person reads when a test breaks its budget."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_vram.memory import note_lines, spread_of
from pytest_vram.plugin.ranks import lines as process_lines
from pytest_vram.probe.history import BACKWARD
from pytest_vram.probe.replay import HELD_BEFORE
from pytest_vram.report.chart import curve
from pytest_vram.report.likely import words
from pytest_vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_vram.memory import Budget, FixtureShare, Holder, Measurement, Note, Phase, Process, Timeline
    from pytest_vram.memory.process import CardNeed

_KINDS = {
    "cuda": "measured on the GPU",
    "dry": "dry GPU: PyTorch's allocator, no kernel ran",
    "host": "traced on the CPU: tensor bytes, rounded as the CUDA allocator rounds them",
    "nvml": "sampled by NVML",
    "accelerator": "measured on the accelerator",
}


def budget_message(
    budget: Budget,
    limit: int,
    peak: int,
    measurement: Measurement,
    *,
    phase: str | None,
    holders: Sequence[Holder],
    example: str | None = None,
    peak_phase: str | None = None,
    processes: Sequence[Process] = (),
    card: CardNeed | None = None,
) -> str:
    """Return the failing test's message: limit, peak and excess, where the peak was, who held it, and one remedy."""
    device = measurement.device
    what = f"phase {phase!r}" if phase else "the test"
    lines = [
        (
            f"{what} needed {format_bytes(peak)} of {budget.metric} memory, {format_bytes(peak - limit)} more than"
            f" its budget of {format_bytes(limit)}"
        ),
        f"  peak    {peak:>16,} bytes",
        f"  budget  {limit:>16,} bytes  ({budget.origin}{f' at {budget.where}' if budget.where else ''})",
        f"  device  {device.name}, {device.kind}: {_KINDS[device.kind]}",
    ]
    if card is not None and processes:
        lines += _by_process(budget, processes, card)
    if example:
        lines.append(f"  example {example}")
    if peak_phase:
        lines.append(f"  where   in phase {peak_phase!r}")
    if measurement.phases:
        lines.append(f"  phases  {_by_phase(measurement.phases, budget)}")
    lines += _bill(measurement.fixtures)
    if holders:
        lines += ["  held at the peak, by the line that allocated it:", *_held(holders, measurement)]
    lines += _noted(measurement.notes)
    lines += _likely(budget, peak, limit, measurement)
    if measurement.timeline is not None:
        counted = _counted(measurement.timeline, measurement.uncounted_bytes)
        shown = curve(counted, limit=limit if budget.metric == "allocated" else None, phases=measurement.phases)
        lines += ["", *(f"  {line}" for line in shown), ""]
    lines.append("  " + remedy(budget, peak, limit, measurement, holders))
    return "\n".join(lines)


def _by_process(budget: Budget, processes: Sequence[Process], card: CardNeed) -> list[str]:
    """Return lines that name the process of the peak and list all processes side by side."""
    whose = "the test's own process" if card.process is None else card.process.title
    if card.processes > 1:
        whose += f", the largest of {card.processes} processes on the card: peaks of those that lived together add up"
    title = f"  peaks of the processes below the test ({budget.metric}):"
    return [f"  process {whose}", title, *process_lines(processes, budget.metric)]


def remedy(budget: Budget, peak: int, limit: int, measurement: Measurement, holders: Sequence[Holder]) -> str:
    """Return the one thing to try first."""
    over = peak - limit
    shared = [share for share in measurement.fixtures if share.scope != "function"]
    if sum(share.size_bytes for share in shared) > over and sum(share.size_bytes for share in shared) > peak / 2:
        return (
            f"try: {shared[0].scope} fixture {shared[0].name!r} holds most of it; give it a narrower scope, or"
            " scope='call'"
        )
    allocated = measurement.figure("allocated")
    if budget.metric != "allocated" and allocated is not None and allocated <= limit:
        return (
            f"try: only {format_bytes(allocated)} were allocated, the rest is the allocator's cache and the context: "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, or metric='allocated'"
        )
    if (named := _by_category(measurement, holders)) is not None:
        return named
    if made_here := [h for h in holders if h.location not in (HELD_BEFORE, BACKWARD)]:
        return f"try: of your lines {made_here[0].location} holds most; release it earlier, or make it smaller"
    return "try: a smaller batch, a narrower dtype, or checkpointed activations; --vram-report shows every test's peak"


_REMEDIES: dict[str, str] = {
    "weights": "a narrower dtype, or quantization (NF4 takes a quarter of bf16)",
    "adapters": "a smaller rank, or fewer target modules",
    "gradients": "adapters on a frozen base, or an optimizer step within the backward pass",
    "optimizer": "an 8-bit or a paged optimizer, or adapters on a frozen base",
    "activations": "activation checkpointing, a smaller micro-batch, or shorter rows",
    "logits": "the loss in chunks, so that the logits of all tokens never exist at once",
    "temporary": "a smaller micro-batch or shorter rows; what is temporary grows with both",
}

_SPOKEN = {"optimizer": "optimizer states", "temporary": "temporary tensors"}


def _by_category(measurement: Measurement, holders: Sequence[Holder]) -> str | None:
    """Return what helps against the largest category of memory, or None if categories were not recorded."""
    timeline = measurement.timeline
    parts = {name: size for name, size in timeline.at_peak().items() if name in _REMEDIES} if timeline else {}
    if not timeline or not parts:
        return None
    name = max(parts, key=parts.__getitem__)
    lines = [h.location for h in holders if h.category == name and h.location not in (HELD_BEFORE, BACKWARD)]
    where = f", most of it from {lines[0]}" if lines else ""
    share = f"{format_bytes(parts[name])} of it ({parts[name] / timeline.peak_bytes:.0%})"
    return f"try: {_SPOKEN.get(name, name)} hold {share}{where}: {_REMEDIES[name]}"


def leak_message(leaked: int, limit: int, holders: Sequence[Holder], notes: Sequence[Note] = ()) -> str:
    """Return the message for a test that left too much: how much, and the lines that allocated what is still there."""
    lines = [
        f"the test left {format_bytes(leaked)} ({leaked:,} bytes) behind, and its limit is {format_bytes(limit)}"
        " (max_leak_mb)"
    ]
    if holders:
        lines += ["  still there, by the line that allocated it:", *_by_line(holders)]
    lines += _noted(notes)
    lines.append("  try: see what outlives the test: a global, a cache, a closure, or an optimizer's state")
    return "\n".join(lines)


def fixture_line(share: FixtureShare) -> str:
    """Return a text such as ``session fixture `llama` holds 14.2 GiB``."""
    return f"{share.scope} fixture `{share.name}` holds {format_bytes(share.size_bytes)}"


def memory_section(measurement: Measurement, holders: Sequence[Holder]) -> str:
    """Return the memory section for a test that failed for another reason, such as an out-of-memory error."""
    peak = measurement.peak
    lines = [
        f"{measurement.device.name} ({measurement.device.kind}): peak allocated {format_bytes(peak.allocated_bytes)},"
        f" reserved {format_bytes(peak.reserved_bytes)}, retries {measurement.retries}, out-of-memory errors"
        f" {measurement.ooms}"
    ]
    if measurement.uncounted_bytes:
        lines.append(f"{format_bytes(measurement.uncounted_bytes)} of it other tests and their fixtures had left there")
    lines += [line.strip() for line in (*_bill(measurement.fixtures), *_noted(measurement.notes))]
    lines += [line.removeprefix("    ") for line in _by_line(holders)]
    return "\n".join(lines)


def _counted(timeline: Timeline, uncounted: int) -> Timeline:
    """Return the curve of the memory that counts against the test."""
    return replace(timeline, allocated=tuple(max(0, size - uncounted) for size in timeline.allocated))


def _likely(budget: Budget, peak: int, limit: int, measurement: Measurement) -> list[str]:
    """Return a line on the likely range of the peak if the bounds show that a card may keep the budget."""
    spread = spread_of(peak, measurement.notes, allocated=budget.metric == "allocated")
    if spread is None or not spread.straddles(limit):
        return []
    return [f"  likely  a card needs {words(spread)}"]


def _noted(notes: Sequence[Note]) -> list[str]:
    return [f"  note    {line}" for line in note_lines(notes)]


def _bill(fixtures: Sequence[FixtureShare]) -> list[str]:
    return ["  " + fixture_line(share) for share in sorted(fixtures, key=lambda s: -s.size_bytes)]


def _held(holders: Sequence[Holder], measurement: Measurement) -> list[str]:
    """Return a line for each holder, and a last line for the rest of the peak."""
    whole = measurement.figure("allocated") or 0
    lines = _by_line(holders, whole)
    rest = whole - sum(holder.size_bytes for holder in holders)
    return lines + ([f"    {format_bytes(rest):>9}  elsewhere"] if rest > 0 else [])


def _by_line(holders: Sequence[Holder], whole: int = 0) -> list[str]:
    return [f"    {format_bytes(h.size_bytes):>9}  {h.location}{_what(h, whole)}" for h in holders]


def _by_phase(phases: Sequence[Phase], budget: Budget) -> str:
    """Return each phase's name once, with its largest peak, because a loop measures the same phases many times."""
    found: dict[str, list[int]] = {}
    for phase in phases:
        found.setdefault(phase.name, []).append(_metric(phase.peak, budget) or 0)
    return ", ".join(
        f"{name} {format_bytes(max(sizes))}{f' ({len(sizes)} times)' if len(sizes) > 1 else ''}"
        for name, sizes in found.items()
    )


def _what(holder: Holder, whole: int = 0) -> str:
    """Return a holder's share of ``whole``, category, module and number of allocations, as far as they are known."""
    known = [text for text in (holder.category, holder.module) if text]
    if whole and holder.size_bytes < whole:
        known.insert(0, f"{share:.0%}" if (share := holder.size_bytes / whole) >= 0.005 else "<1%")
    if holder.count > 1:
        known.append(f"{holder.count} allocations")
    return f"  ({', '.join(known)})" if known else ""


def _metric(peak: object, budget: Budget) -> int | None:
    value: int | None = getattr(peak, f"{budget.metric}_bytes")
    return value
