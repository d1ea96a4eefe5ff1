"""The result of a dry run as JSON and as a report."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from finetune.config.settings import RunConfig
from finetune.dryrun.assumptions import lines
from finetune.dryrun.messages import Recording, Trial
from finetune.dryrun.report import Outcome, as_json, as_report, render
from pytest_vram.drygpu.cards import IDLE_CONTEXT, context_notes, context_source, find_card
from pytest_vram.memory import Exceeded, Holder, HostRead, Note, Peak, Phase, Series, Timeline, Within
from pytest_vram.memory.spread import LIBRARY

GIB = 2**30
RECORDING = Recording(
    timeline=Timeline(
        times=(0.0, 1.0),
        allocated=(GIB, 5 * GIB),
        reserved=(GIB, 6 * GIB),
        categories=(Series(name="weights", sizes=(GIB, 5 * GIB)),),
        modules=(),
        peak_index=1,
        events=2,
    ),
    holders=(Holder(size_bytes=5 * GIB, count=2, location="model.py:1", category="weights"),),
    phases=(Phase(name="loading", start=0.0, end=1.0, peak=Peak(allocated_bytes=5 * GIB)),),
)
READ = HostRead(location="step.py:3", operation="item", count=2, answered=False, note="read as zero")
TRIAL = Trial(
    fits=True,
    message="",
    phases={"loading": 5 * GIB},
    categories={"weights": 5 * GIB},
    peak_allocated=5 * GIB,
    peak_reserved=6 * GIB,
    peak_device=7 * GIB,
    context=GIB,
    total=16 * GIB,
    managed=3,
    seconds=7.0,
    device="NVIDIA GeForce RTX 4080",
    dry=True,
    host_reads=(READ,),
    recording=RECORDING,
)
FITS = Outcome(trial=TRIAL)
REFUSED = Outcome(
    trial=replace(TRIAL, fits=False, message="CUDA out of memory.", peak_device=16 * GIB, recording=None),
    roomy=replace(TRIAL, peak_device=20 * GIB, total=1024 * GIB),
)


def test_the_figures_of_a_run_that_fits() -> None:
    found = json.loads(as_json("python -m finetune.qlora", "rtx-4080", FITS))
    assert found["fits"] is True
    assert found["kind"] == "dry"
    assert found["gpu"] == "rtx-4080"
    assert found["out_of_memory"] is None
    names = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes", "total_bytes", "context_bytes")
    assert [found[name] / GIB for name in names] == [5, 6, 7, 16, 1]
    assert found["managed_bytes"] == 3
    assert found["host_reads"] == [asdict(READ)]


def test_the_figures_of_a_run_that_does_not_fit_are_what_it_would_need_of_the_card_that_was_named() -> None:
    found = json.loads(as_json("python -m finetune.qlora", "rtx-4080", REFUSED))
    assert found["fits"] is False
    assert found["peak_device_bytes"] == 20 * GIB
    assert found["total_bytes"] == 16 * GIB
    assert found["out_of_memory"] == "CUDA out of memory."


def test_only_a_context_that_was_not_measured_is_called_approximate() -> None:
    assert f"  context   {IDLE_CONTEXT}" in render(RunConfig(), "rtx-4080", FITS).splitlines()
    for card in ("h200", None):  # the second is the card of this machine, whose context is read
        assert IDLE_CONTEXT not in render(RunConfig(), card, FITS)
    found = json.loads(as_json("python -m finetune.qlora", "rtx-4080", FITS))
    assert found["context_source"] == context_source(find_card("rtx-4080"))
    assert found["context_caveat"] == IDLE_CONTEXT
    for name, card in (("context_source", None), ("context_caveat", None), ("context_caveat", "h200")):
        assert json.loads(as_json("python -m finetune.qlora", card, FITS))[name] is None
    for device, notes in (("NVIDIA GeForce RTX 4080", [IDLE_CONTEXT]), ("NVIDIA H200", [])):
        outcome = Outcome(trial=replace(FITS.trial, device=device))
        (test,) = as_report("python -m finetune.qlora", outcome).tests
        assert [note.text for note in test.measurements[0].notes] == notes


def test_a_report_holds_the_run_against_the_card() -> None:
    (test,) = as_report("python -m finetune.qlora", FITS).tests
    assert test.nodeid == "python -m finetune.qlora"
    assert test.outcome == "passed"
    assert test.verdict == Within(headroom_bytes=9 * GIB)
    (measured,) = test.measurements
    assert (measured.device.kind, measured.device.name) == ("dry", "NVIDIA GeForce RTX 4080")
    assert measured.figure("device") == 7 * GIB
    assert measured.figure("allocated") == 5 * GIB
    assert measured.figure("reserved") == 6 * GIB
    assert measured.phases[0].peak.allocated_bytes == 5 * GIB
    assert measured.holders[0].location == "model.py:1"
    assert measured.timeline is not None
    assert measured.timeline.peak_bytes == 5 * GIB
    assert measured.host_reads[0].count == 2
    assert measured.ooms == 0


def test_a_report_of_a_run_that_does_not_fit() -> None:
    (test,) = as_report("python -m finetune.qlora", REFUSED).tests
    assert test.outcome == "failed"
    assert test.verdict == Exceeded(over_bytes=4 * GIB)
    assert test.measurements[0].ooms == 1


@pytest.mark.parametrize(("dry", "kind"), [(True, "dry"), (False, "cuda")])
def test_a_card_that_was_measured_is_told_from_a_dry_one(dry: bool, kind: str) -> None:
    outcome = Outcome(trial=replace(TRIAL, dry=dry))
    assert as_report("x", outcome).environment.devices[0].kind == kind
    assert json.loads(as_json("x", None, outcome))["kind"] == kind


def test_what_a_trial_rests_on_is_listed_once_and_its_bounds_follow() -> None:
    router = replace(READ, note="indices taken as spread evenly; 8 of them")
    text = "its scratch memory is unknown"
    note = Note(name="cuFFT (_fft_r2c)", text=text, source="operators", size_bytes=GIB // 2)
    trial = replace(TRIAL, host_reads=(router, router), notes=(note,), context=GIB, peak_device=7 * GIB)
    assert lines(trial) == [
        "rests on  indices taken as spread evenly",
        "rests on  cuFFT (_fft_r2c): its scratch memory is unknown",
        f"likely    on the card between 7.00 GiB and 8.00 GiB, {LIBRARY}",
    ]
    assert "only likely" in lines(replace(trial, total=int(7.5 * GIB)))[-1]
    found = json.loads(as_json("train", "rtx-4080", Outcome(trial=trial)))
    assert found["notes"] == [asdict(note)]
    assert found["peak_device_spread"]["high"] == 8 * GIB
    (measured,) = as_report("train", Outcome(trial=trial)).tests[0].measurements
    assert measured.notes == (note, *context_notes(trial.device))


def test_a_trial_that_rests_on_no_guess_has_no_bounds() -> None:
    assert lines(TRIAL) == []
    assert json.loads(as_json("train", "rtx-4080", FITS))["peak_device_spread"] is None
