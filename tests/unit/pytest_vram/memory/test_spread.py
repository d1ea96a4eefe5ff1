"""How far off a figure may be, by the assumptions that it rests on."""

from __future__ import annotations

from pytest_vram.memory import Note, Spread, shared_blocks, spread_of
from pytest_vram.memory.spread import MEASURED, SHARED
from pytest_vram.units import GIB


def note(name: str, *, figures: bool = True) -> Note:
    return Note(name=name, text="a guess", source="driver", figures=figures)


def test_a_figure_that_rests_on_nothing_or_on_what_was_never_measured_has_no_bounds() -> None:
    assert spread_of(GIB, ()) is None
    assert spread_of(GIB, [note("NCCL"), note("memory history")]) is None
    assert spread_of(GIB, [note("cudaMallocAsync", figures=False)]) is None


def test_bounds_are_those_of_the_metric() -> None:
    found = spread_of(100, [note("cudaMallocAsync")])
    assert found == Spread(low=98, expected=100, high=102)
    assert spread_of(100, [note("cudaMallocAsync")], allocated=True) is None
    assert spread_of(1000, [note("cuDNN weight gradients in fp32")], allocated=True) == Spread(
        low=1000, expected=1000, high=1003
    )


def test_what_two_assumptions_may_change_is_multiplied_and_one_of_a_kind_counts_once() -> None:
    found = spread_of(1000, [note("cuFFT (_fft_r2c)"), note("cuFFT (_fft_c2r)"), note("cudaMallocAsync")])
    assert found == Spread(low=980, expected=1000, high=1173)
    assert spread_of(1000, [note("cuFFTs")]) is None


def test_blocks_that_streams_share_add_their_bytes_to_the_upper_bound_of_reserved_memory() -> None:
    shared = Note(name=shared_blocks.NAME, text=shared_blocks.text(64), source="operators")
    assert spread_of(1000, [shared]) == Spread(low=1000, expected=1000, high=1064)
    assert spread_of(1000, [shared], allocated=True) is None
    assert spread_of(100, [shared, note("cudaMallocAsync")]) == Spread(low=98, expected=100, high=166)


def test_bounds_say_what_they_are_taken_from() -> None:
    shared = Note(name=shared_blocks.NAME, text=shared_blocks.text(64), source="operators")
    found = [
        spread_of(1000, notes) for notes in ([note("cudaMallocAsync")], [shared], [shared, note("cudaMallocAsync")])
    ]
    assert [spread.basis if spread else None for spread in found] == [MEASURED, SHARED, f"{MEASURED}, and {SHARED}"]
    assert found[1] is not None
    assert found[1].shifted(8).basis == SHARED


def test_convolutions_and_their_weight_gradients_count_once() -> None:
    both = [note("cuDNN convolutions"), note("cuDNN weight gradients in fp32")]
    assert spread_of(100, both) == spread_of(100, both[:1]) == Spread(low=100, expected=100, high=116)


def test_a_limit_straddles_when_a_card_may_be_on_either_side_of_it() -> None:
    spread = Spread(low=98, expected=100, high=102)
    assert [limit for limit in range(96, 104) if spread.straddles(limit)] == [98, 99, 100, 101]
