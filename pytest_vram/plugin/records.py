"""Keeps a test's record with the test while it runs, and writes it once, into the report of the test's teardown."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram.memory import TestRecord
from pytest_vram.memory.codec import decode, encode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_vram.memory import Process

RECORD = pytest.StashKey[TestRecord]()
"""The stash key under which a test keeps its record."""
PROPERTY = "vram"
"""The name of a record in the ``user_properties`` of a report, which xdist passes on and JUnit files include."""


def keep(item: pytest.Item, record: TestRecord) -> None:
    """Keep a test's record, and pass it to other plugins."""
    item.stash[RECORD] = record
    item.ihook.pytest_vram_record(item=item, record=record)


def forget(item: pytest.Item) -> None:
    """Drop the record of an earlier run of the same test."""
    if RECORD in item.stash:
        del item.stash[RECORD]


def change(item: pytest.Item, **fields: Any) -> None:
    """Change fields of a test's record, if it has one."""
    if RECORD in item.stash:
        item.stash[RECORD] = replace(item.stash[RECORD], **fields)


def failed(item: pytest.Item) -> bool:
    """Return whether the test has a record that says that it failed."""
    return RECORD in item.stash and item.stash[RECORD].outcome == "failed"


def add_leak(item: pytest.Item, left: Sequence[int]) -> None:
    """Add to the record how much the test left on each device, in bytes."""
    if RECORD in item.stash:
        measurements = item.stash[RECORD].measurements
        sized = [replace(m, leaked_bytes=size) for m, size in zip(measurements, left, strict=False)]
        change(item, measurements=(*sized, *measurements[len(sized) :]))


def add_left(item: pytest.Item, left: Sequence[Process]) -> None:
    """Add to the record which of the test's processes still run, and what they hold."""
    if RECORD in item.stash:
        still = {process.pid: process for process in left}
        known = tuple(
            replace(p, left=True, left_bytes=still.pop(p.pid).left_bytes) if p.pid in still else p
            for p in item.stash[RECORD].processes
        )
        change(item, processes=(*known, *still.values()))


def attach(item: pytest.Item, report: pytest.TestReport) -> None:
    """Write a test's record, if it has one, into a report."""
    if RECORD in item.stash:
        report.user_properties.append((PROPERTY, written(item.stash[RECORD])))


def written(record: TestRecord) -> str:
    """Return a record as compact JSON."""
    return json.dumps(encode(record), separators=(",", ":"))


def read(text: object) -> TestRecord:
    """Return the record that :func:`written` wrote."""
    return decode(TestRecord, json.loads(str(text)))
