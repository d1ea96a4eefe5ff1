"""How far off a figure may be, by the assumptions that it rests on."""

from __future__ import annotations

import pytest

from pytest_vram.memory import Note, Spread, shared_blocks, spread_of
from pytest_vram.memory.spread import LIBRARY, MEASURED, SHARED, WORKSPACE
from pytest_vram.units import GIB, MIB


def note(name: str, size: int = 0, *, figures: bool = True) -> Note:
    return Note(name=name, text="a guess", source="driver", figures=figures, size_bytes=size)


def test_a_figure_that_rests_on_nothing_or_on_what_was_never_measured_has_no_bounds() -> None:
    assert spread_of(GIB, ()) is None
    assert spread_of(GIB, [note("NCCL"), note("memory history"), note("cuFFTs", GIB)]) is None
    assert spread_of(GIB, [note("cudaMallocAsync", figures=False)]) is None
    assert spread_of(GIB, [note("cuDNN convolutions")]) is None, "no workspace is no guess"


def test_bounds_are_those_of_the_metric() -> None:
    assert spread_of(100, [note("cudaMallocAsync")]) == Spread(low=98, expected=100, high=102)
    assert spread_of(100, [note("cudaMallocAsync")], allocated=True) is None


def test_a_workspace_changes_a_figure_by_a_share_of_itself_and_may_take_a_segment_of_its_own() -> None:
    convolution = [note("cuDNN convolutions", 100 * MIB)]
    assert spread_of(GIB, convolution, allocated=True) == Spread(
        low=GIB - 9 * MIB, expected=GIB, high=GIB + 9 * MIB, basis=WORKSPACE
    )
    assert spread_of(GIB, convolution) == Spread(low=GIB - 9 * MIB, expected=GIB, high=GIB + (9 + 110) * MIB)


@pytest.mark.parametrize(("size", "segment"), [(MIB // 2, 2 * MIB), (2 * MIB, 20 * MIB), (200 * MIB, 218 * MIB)])
def test_bounds_do_not_grow_with_the_figure(size: int, segment: int) -> None:
    """A patch embedding beside a transformer: however large the figure is, the workspace decides."""
    for figure in (GIB, 64 * GIB):
        found = spread_of(figure, [note("cuDNN convolutions", size)])
        assert found is not None
        assert found.high - found.expected - (found.expected - found.low) == segment


def test_of_a_kind_the_largest_counts_and_kinds_are_added() -> None:
    small, large = note("cuFFT (_fft_r2c)", 10), note("cuFFT (_fft_c2r)", 30)
    assert spread_of(1000, [small, large]) == Spread(low=1000, expected=1000, high=1060)
    assert spread_of(1000, [small, large, note("cudaMallocAsync")]) == Spread(low=980, expected=1000, high=1080)
    both = [note("cuDNN convolutions", 100), note("cuDNN weight gradients in fp32"), note("cuDNN convolutions", 50)]
    assert spread_of(10_000, both, allocated=True) == Spread(low=9_991, expected=10_000, high=10_009)


def test_a_workspace_that_a_library_does_not_tell_widens_both_metrics() -> None:
    for name, less, more in (
        ("cuDNN recurrent layers", 8, 8),
        ("cuDNN dropout", 8, 8),
        ("cuDNN batch norm of channels_last", 0, 8),
        ("cuDNN CTC loss", 0, 16),
    ):
        bounds = Spread(low=1000 - less, expected=1000, high=1000 + more, basis=LIBRARY)
        assert spread_of(1000, [note(name, 8)], allocated=True) == bounds
        assert spread_of(1000, [note(name, 8)]) == Spread(low=1000 - less, expected=1000, high=1000 + more + 2 * MIB)
    assert spread_of(1000, [note("cuDNN recurrent layers")]) is None, "cuDNN named it"


def test_blocks_that_streams_share_add_their_bytes_to_the_bounds_of_reserved_memory() -> None:
    shared = note(shared_blocks.NAME, 64)
    assert spread_of(1000, [shared]) == Spread(low=936, expected=1000, high=1064)
    assert spread_of(1000, [shared], allocated=True) is None
    assert spread_of(100, [shared, note("cudaMallocAsync")]) == Spread(low=34, expected=100, high=166)


def test_bounds_say_what_they_are_taken_from() -> None:
    shared, pool, transform = note(shared_blocks.NAME, 64), note("cudaMallocAsync"), note("cuFFT (_fft_r2c)", 8)
    found = [spread_of(1000, notes) for notes in ([pool], [shared], [shared, pool], [transform])]
    assert [spread.basis if spread else None for spread in found] == [
        MEASURED,
        SHARED,
        f"{MEASURED}, and {SHARED}",
        LIBRARY,
    ]
    assert found[1] is not None
    assert found[1].shifted(8).basis == SHARED


def test_no_bound_is_below_zero() -> None:
    found = spread_of(5, [note("cuSOLVER", 64)], allocated=True)
    assert found == Spread(low=0, expected=5, high=69)


def test_a_limit_straddles_when_a_card_may_be_on_either_side_of_it() -> None:
    spread = Spread(low=98, expected=100, high=102)
    assert [limit for limit in range(96, 104) if spread.straddles(limit)] == [98, 99, 100, 101]
