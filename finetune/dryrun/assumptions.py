"""Tells what a trial's figures rest on, and how far off they may be for that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_vram.memory import note_lines
from pytest_vram.report.likely import on_device, words

if TYPE_CHECKING:
    from finetune.dryrun.messages import Trial
    from pytest_vram.memory import Note, Spread


def collect() -> tuple[Note, ...]:
    """Return the assumptions that this process's dry GPUs have made; none on a GPU that computes."""
    from pytest_vram.drygpu import driver, notes

    return notes.so_far() if driver.is_active() else ()


def spread(trial: Trial) -> Spread | None:
    """Return the bounds of ``peak_device``; None if nothing tells how far off it may be."""
    return on_device(trial.peak_device, trial.context, trial.notes)


def lines(trial: Trial) -> list[str]:
    """Return the trial's guesses, one line each, and a line with the bounds that follow from them.

    A guess is an assumption of the dry GPU, or a value that decides the course of a run and that it does not compute,
    such as the choice of experts by a mixture's router.
    """
    guessed = (read.note.partition("; ")[0] for read in trial.host_reads)
    found = [f"rests on  {note}" for note in dict.fromkeys(note for note in guessed if " taken as " in note)]
    found += [f"rests on  {line}" for line in note_lines(trial.notes)]
    if (bounds := spread(trial)) is not None:
        likely = "; fits and does not fit are only likely" if bounds.straddles(trial.total) else ""
        found.append(f"likely    on the card {words(bounds)}{likely}")
    return found
