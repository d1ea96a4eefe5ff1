"""The list of host reads: whose line it is, and what an interval adds."""

from __future__ import annotations

import ctypes
import json
import sys
import sysconfig
from typing import TYPE_CHECKING

import pytest

from pytest_vram.drygpu.values import host_reads
from pytest_vram.drygpu.values.host_reads import Announced

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _empty_list() -> Iterator[None]:
    host_reads.reset()
    yield
    host_reads.reset()


def test_the_line_is_the_users() -> None:
    line = sys._getframe().f_lineno + 1
    host_reads.note("item", answered=False, remark="why")
    (read,) = host_reads.collect()
    assert read.location.endswith(f"test_host_reads.py:{line}")
    assert (read.operation, read.answered, read.note, read.count) == ("item", False, "why", 1)


def test_library_code_in_between_is_named() -> None:
    """A read inside a library is the user's, by way of the library's line."""
    source = compile(
        "def ask(note):\n    note('item', answered=True)\n", f"{sysconfig.get_path('purelib')}/somelib/core.py", "exec"
    )
    names: dict[str, object] = {}
    exec(source, names)
    names["ask"](host_reads.note)  # type: ignore[operator]  # a name from exec
    (read,) = host_reads.collect()
    assert "test_host_reads" in read.location
    assert read.note == "in somelib/core.py:2"


def test_torch_and_the_standard_library_are_passed_over() -> None:
    json.loads("[1]", parse_int=lambda text: host_reads.note("item", answered=True))
    (read,) = host_reads.collect()
    assert "test_host_reads" in read.location
    assert read.note == ""


def test_code_that_was_typed_in_is_the_users() -> None:
    exec(compile("note('item', answered=True)", "<stdin>", "exec"), {"note": host_reads.note})
    (read,) = host_reads.collect()
    assert read.location == "<stdin>:1"


def test_unanswered_reads_come_first_then_the_frequent_ones() -> None:
    for answered in (True, True, False):
        host_reads.note("item", answered=answered)
    assert next((read.answered, read.count) for read in host_reads.collect()) == (False, 1)


def test_an_interval_counts_what_it_added() -> None:
    def read() -> None:
        host_reads.note("item", answered=True)

    read()
    before = host_reads.collect()
    read()
    read()
    (added,) = host_reads.since(before)
    assert added.count == 2
    assert host_reads.since(host_reads.collect()) == ()


@pytest.mark.parametrize("size", [4, 8])
def test_a_count_is_answered_in_the_width_that_is_asked_for(size: int) -> None:
    answer = ctypes.c_uint64(0xFFFFFFFFFFFFFFFF)
    with host_reads.reading(Announced(operation="nonzero", count=5, whole=True)):
        assert host_reads.on_read(0, size, True, ctypes.addressof(answer))
    assert ctypes.string_at(ctypes.addressof(answer), size) == (5).to_bytes(size, "little")


def test_stale_bytes_are_answered_with_zeros() -> None:
    """The stub has bytes at the address, but nobody vouches for them."""
    answer = ctypes.c_uint64(7)
    with host_reads.reading(Announced(operation="item", known=False)):
        assert host_reads.on_read(0, 8, True, ctypes.addressof(answer))
    assert answer.value == 0


def test_known_values_are_left_to_the_stub() -> None:
    with host_reads.reading(Announced(operation="item", known=True, guess="a guess")):
        assert not host_reads.on_read(0, 8, True, 0)
    (read,) = host_reads.collect()
    assert (read.answered, read.note) == (True, "a guess")


def test_an_operator_inside_another_reads_on_its_behalf() -> None:
    with (
        host_reads.reading(Announced(operation="equal", whole=True)),
        host_reads.reading(Announced(operation="item", known=False)),
    ):
        host_reads.on_read(0, 8, False, 0)
    assert [read.operation for read in host_reads.collect()] == ["equal"]


@pytest.mark.parametrize("guess", ["", "values taken as finite"])
def test_a_line_that_reads_guesses_again_and_again_is_told_of_once(
    guess: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that waits for a value which a dry GPU does not compute does not end, and shows nothing by itself."""
    monkeypatch.setattr(host_reads, "_MANY", 5)
    for _ in range(20):
        host_reads.note("item", answered=bool(guess), remark=guess)
    told = capfd.readouterr().err
    assert told.count("test_host_reads.py") == (1 if guess else 0)
    assert ("values that rest on a guess (item: values taken as finite)" in told) == bool(guess)
