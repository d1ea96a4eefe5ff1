"""Requests and results arrive unchanged in the other process, and an error names the field that is wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from finetune.dryrun.messages import Candidate, Found, Recording, Refusal, Request, Result, Trial
from finetune.errors import Problem
from pytest_vram.errors import VramUsageError
from pytest_vram.memory import Holder, HostRead, Peak, Phase, Series, Timeline
from pytest_vram.memory.codec import decode, encode

RECORDING = Recording(
    timeline=Timeline(
        times=(0.0, 1.0),
        allocated=(1, 5),
        reserved=(2, 6),
        categories=(Series(name="weights", sizes=(1, 5)),),
        modules=(),
        peak_index=1,
        events=2,
    ),
    holders=(Holder(size_bytes=5, count=2, location="model.py:1", category="weights"),),
    phases=(Phase(name="loading", start=0.0, end=1.0, peak=Peak(allocated_bytes=5)),),
)
TRIAL = Trial(
    fits=False,
    message="CUDA out of memory.",
    phases={"loading": 5},
    categories={"weights": 5},
    peak_allocated=5,
    peak_reserved=6,
    peak_device=7,
    context=1,
    total=16,
    managed=3,
    seconds=7.5,
    device="NVIDIA GeForce RTX 4080",
    dry=True,
    host_reads=(HostRead(location="step.py:3", operation="item", count=2, answered=False, note="read as zero"),),
    recording=RECORDING,
)
PROBLEM = Problem(field="rank", value=3, why="odd", remedy="use 4")
SETTINGS = {"micro_batch": 9, "accumulation": 2, "checkpointing": 12, "rank": 16, "seq": 512}
CANDIDATE = Candidate(settings=SETTINGS, tokens_per_second=1234.5, needed=7)


@pytest.mark.parametrize(
    "message",
    [
        Request(kind="run", settings={"model": "m", "targets": ["q"]}, changes=({"seq": 4}, {}), over_time=True),
        Request(kind="search", settings={}, open_settings=("seq", "rank"), limit_bytes=5),
        Result(trials=(TRIAL, TRIAL)),
        Request(kind="run", settings={}, choose=True),
        Result(trials=(replace(TRIAL, chosen=SETTINGS | {"checkpointing": "all"}, note="all"),)),
        Result(found=Found(best=CANDIDATE, others=(CANDIDATE, Candidate(settings=SETTINGS)), trials=5)),
        Result(found=Found(best=None, trials=4)),
        Result(refusal=Refusal(kind="setting", message="rank", problems=(PROBLEM,))),
    ],
)
def test_what_is_sent_is_what_arrives(message: Request | Result) -> None:
    assert decode(type(message), json.loads(json.dumps(encode(message)))) == message


def test_a_field_that_is_missing_or_of_another_type_is_named() -> None:
    sent = encode(Result(trials=(TRIAL,)))
    del sent["trials"][0]["fits"]
    with pytest.raises(VramUsageError, match=r"Result\.trials\[0\] has no 'fits'"):
        decode(Result, sent)
    sent = encode(Result(trials=(TRIAL,)))
    sent["trials"][0]["recording"]["timeline"]["allocated"][1] = "much"
    with pytest.raises(VramUsageError, match=r"recording\.timeline\.allocated\[1\] is 'much', which is not int"):
        decode(Result, sent)
