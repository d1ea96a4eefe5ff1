"""Assumptions of one kind become one, with the largest of their sizes."""

from __future__ import annotations

from pytest_vram.memory import Note, merged, without_size

SMALL = Note(name="cuDNN convolutions", text="a guess", source="driver", size_bytes=5)
LARGE = Note(name="cuDNN convolutions", text="a guess", source="driver", size_bytes=7)
OTHER = Note(name="NCCL", text="a guess", source="driver")


def test_each_assumption_is_there_once_with_its_largest_size() -> None:
    assert merged([SMALL, OTHER, LARGE, SMALL]) == (LARGE, OTHER)
    assert merged([]) == ()


def test_tests_with_other_sizes_make_the_same_assumption() -> None:
    assert without_size(SMALL) == without_size(LARGE) != without_size(OTHER)
