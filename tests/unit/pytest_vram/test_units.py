from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vram.units import GIB, KIB, MIB, TIB, format_bytes, gb_to_bytes

_FACTORS = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}


def parse(text: str) -> float:
    number, unit = text.split()
    return float(number) * _FACTORS[unit]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "n/a"),
        (0, "0 B"),
        (1, "1 B"),
        (-3, "-3 B"),
        (999, "999 B"),
        (1023, "1023 B"),
        (KIB, "1.00 KiB"),
        (10 * KIB - 1, "10.0 KiB"),
        (100 * KIB - 1, "100 KiB"),
        (1000 * KIB, "1000 KiB"),
        (MIB - 1, "1.00 MiB"),
        (GIB - MIB, "1023 MiB"),
        (GIB - 1, "1.00 GiB"),
        (round(14.2 * GIB), "14.2 GiB"),
        (-GIB, "-1.00 GiB"),
        (3 * TIB, "3.00 TiB"),
        (5000 * TIB, "5000 TiB"),
    ],
)
def test_sizes_are_written_with_three_digits(size: int | None, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(-(2**60), 2**60))
def test_what_is_written_reads_as_the_same_size_to_three_digits(size: int) -> None:
    back = parse(format_bytes(size))
    assert abs(back - size) <= abs(size) * 0.0051


@given(st.integers(0, 2**55), st.integers(0, 2**55))
def test_a_larger_size_is_never_written_as_a_smaller_one(a: int, b: int) -> None:
    small, large = sorted((a, b))
    assert parse(format_bytes(small)) <= parse(format_bytes(large)) or format_bytes(small) == format_bytes(large)


@given(st.integers(0, 1024 * TIB - 1))
def test_no_size_takes_more_than_eight_columns(size: int) -> None:
    assert len(format_bytes(size)) <= len("1023 MiB")


def test_gb_is_a_power_of_two() -> None:
    assert gb_to_bytes(16) == 16 * 2**30
    assert gb_to_bytes(0.5) == 2**29
