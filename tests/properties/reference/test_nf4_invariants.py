"""What holds of NF4 for every input in its domain, and for each property a codec that it rejects.

The domain: finite values, largest magnitude of a block in [2^-126, 2^126]. Each check runs over the reference codec
with both libraries' rules, and over bitsandbytes itself.
"""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.codebook import codebook
from torch import Tensor
from weight_blocks import KINDS, Codec, Coded, make_weights, ours, same_bits, theirs, weights

CODECS = {"reference, CPU rules": ours(), "reference, CUDA rules": ours(rules="cuda"), "bitsandbytes": theirs()}
BLOCK = 64
SOME = settings(max_examples=settings.default.max_examples // 2)


def blocks_of(flat: Tensor) -> list[Tensor]:
    return list(flat.split(BLOCK))


def check_idempotent(codec: Codec, x: Tensor) -> None:
    once = codec(x)
    twice = codec(once.decoded)
    # Below 2^-20 fp16's subnormal numbers are coarser than the table: such a block is outside the domain.
    inside = once.absmax >= (2.0**-20 if x.dtype == torch.float16 else 0.0)
    per_value = inside.repeat_interleave(BLOCK)[: len(x)]
    assert torch.equal(once.codes[per_value], twice.codes[per_value])
    assert torch.equal(once.absmax, twice.absmax)
    assert torch.equal(once.decoded[per_value], twice.decoded[per_value])


def check_largest_is_exact(codec: Codec, x: Tensor) -> None:
    coded = codec(x)
    for block, decoded, absmax in zip(blocks_of(x), blocks_of(coded.decoded), coded.absmax, strict=True):
        assert decoded.abs().max() == block.abs().max()
        assert decoded.abs().max().float() == absmax or block.abs().max() == 0  # a zero partial block stores 1e-38


def check_signs(codec: Codec, x: Tensor) -> None:
    decoded = codec(x).decoded
    assert not (decoded.sign() * x.sign() < 0).any()
    assert (decoded[x == 0] == 0).all()


def check_monotone(codec: Codec, x: Tensor) -> None:
    for block, decoded in zip(blocks_of(x), blocks_of(codec(x).decoded), strict=True):
        ordered = decoded[block.argsort(stable=True)]
        assert (ordered[1:] >= ordered[:-1]).all()


def check_powers_of_two(codec: Codec, x: Tensor) -> None:
    x = x.float() if x.dtype == torch.float16 else x  # fp16 over- and underflows
    plain, scaled = codec(x), codec(x * 2**5)
    assert torch.equal(plain.codes, scaled.codes)
    assert torch.equal(plain.decoded * 2**5, scaled.decoded)


def check_local(codec: Codec, x: Tensor) -> None:
    changed = x.clone()
    changed[:BLOCK] = changed[:BLOCK].flip(0) * 0.5 + 1
    before, after = codec(x), codec(changed)
    assert torch.equal(before.codes[BLOCK:], after.codes[BLOCK:])
    assert torch.equal(before.absmax[1:], after.absmax[1:])
    assert torch.equal(before.decoded[BLOCK:], after.decoded[BLOCK:])


def check_permutation_in_a_block(codec: Codec, x: Tensor) -> None:
    order = torch.cat([torch.randperm(len(b), generator=torch.Generator().manual_seed(1)) for b in blocks_of(x)])
    order = order + torch.arange(len(x)) // BLOCK * BLOCK
    assert torch.equal(codec(x[order]).decoded, codec(x).decoded[order])


def check_sixteen_values(codec: Codec, x: Tensor) -> None:
    for decoded in blocks_of(codec(x).decoded):
        assert decoded.unique().numel() <= 16


def check_concatenation(codec: Codec, x: Tensor) -> None:
    half = len(x) // BLOCK // 2 * BLOCK
    if not half:
        return
    whole, parts = codec(x), [codec(x[:half].clone()), codec(x[half:].clone())]
    assert torch.equal(whole.codes, torch.cat([p.codes for p in parts]))
    assert torch.equal(whole.absmax, torch.cat([p.absmax for p in parts]))
    assert torch.equal(whole.decoded, torch.cat([p.decoded for p in parts]))


def check_memory_layout_and_upcast(codec: Codec, x: Tensor) -> None:
    strided = torch.stack([x, -x], dim=1)[:, 0]
    assert not strided.is_contiguous() or len(x) == 1
    plain = codec(x)
    for other in (codec(strided), codec(x.float())):
        assert torch.equal(plain.codes, other.codes)
        assert torch.equal(plain.absmax, other.absmax)
        assert torch.equal(plain.decoded, other.decoded.to(x.dtype))


def check_nearest(codec: Codec, x: Tensor) -> None:
    coded = codec(x.float())
    for block, codes, absmax in zip(blocks_of(x), blocks_of(coded.codes), coded.absmax, strict=True):
        entries = codebook("nf4").double() * absmax.double()
        distance = (block.double()[:, None] - entries).abs()
        chosen = distance.gather(1, codes.long()[:, None])[:, 0]
        assert (chosen <= distance.min(dim=1).values + 4 * 2.0**-23 * absmax.double()).all()


# Broken codecs, one for each property: what it is there to reject.


def with_double_quant(x: Tensor) -> Coded:
    return ours(double_quant=True)(x)


def with_mean_for_scale(x: Tensor) -> Coded:
    coded = ours()(x)
    return Coded(codes=coded.codes, absmax=coded.absmax, decoded=coded.decoded * 0.99)


def with_signs_lost(x: Tensor) -> Coded:
    coded = ours()(x)
    return Coded(codes=15 - coded.codes, absmax=coded.absmax, decoded=-coded.decoded)


def with_two_entries_swapped(x: Tensor) -> Coded:
    coded = ours()(x)
    codes = coded.codes.clone()
    codes[coded.codes == 9], codes[coded.codes == 10] = 10, 9
    absmax = coded.absmax.repeat_interleave(BLOCK)[: len(x)]
    return Coded(codes=codes, absmax=coded.absmax, decoded=(codebook("nf4")[codes.long()] * absmax).to(x.dtype))


def with_an_absolute_step(x: Tensor) -> Coded:
    return ours()((x.float() * 8).round() / 8)


def with_one_scale_for_all(x: Tensor) -> Coded:
    coded = ours(blocksize=4096)(x)
    return Coded(codes=coded.codes, absmax=coded.absmax.repeat(-(-len(x) // BLOCK)), decoded=coded.decoded)


def with_position_in_it(x: Tensor) -> Coded:
    coded = ours()(x)
    ramp = 1 + torch.arange(len(x)) % BLOCK / 1024
    return Coded(codes=coded.codes, absmax=coded.absmax, decoded=coded.decoded * ramp)


def with_eight_bits(x: Tensor) -> Coded:
    coded = ours()(x)
    steps = coded.absmax.repeat_interleave(BLOCK)[: len(x)].clamp(min=1e-30) / 127
    return Coded(codes=coded.codes, absmax=coded.absmax, decoded=(x / steps).round() * steps)


def with_the_storage_read_flat(x: Tensor) -> Coded:
    return ours()(torch.as_strided(x, x.shape, (1,)))


def with_codes_rounded_down(x: Tensor) -> Coded:
    coded = ours()(x)
    return Coded(codes=(coded.codes.int() - 1).clamp(min=0), absmax=coded.absmax, decoded=coded.decoded)


Check = Callable[[Codec, Tensor], None]
INVARIANTS: dict[str, tuple[Check, Codec]] = {
    "I1 idempotent": (check_idempotent, with_double_quant),
    "I2 largest magnitude exact": (check_largest_is_exact, with_mean_for_scale),
    "I3 signs and zeros": (check_signs, with_signs_lost),
    "I4 monotone": (check_monotone, with_two_entries_swapped),
    "I5 powers of two": (check_powers_of_two, with_an_absolute_step),
    "I6 local to the block": (check_local, with_one_scale_for_all),
    "I7 permutation in a block": (check_permutation_in_a_block, with_position_in_it),
    "I8 sixteen values": (check_sixteen_values, with_eight_bits),
    "I9 concatenation": (check_concatenation, with_one_scale_for_all),
    "I10 layout and dtype": (check_memory_layout_and_upcast, with_the_storage_read_flat),
    "I11 nearest": (check_nearest, with_codes_rounded_down),
}


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
@pytest.mark.parametrize("invariant", INVARIANTS)
@given(x=weights())
@SOME
def test_invariant(invariant: str, codec: Codec, x: Tensor) -> None:
    INVARIANTS[invariant][0](codec, x)


@pytest.mark.parametrize("invariant", INVARIANTS)
def test_invariant_rejects_a_broken_codec(invariant: str) -> None:
    check, broken = INVARIANTS[invariant]
    rejected = 0
    for kind in KINDS:
        for seed in range(3):
            try:
                check(broken, make_weights(kind, 5 * BLOCK, seed=seed))
            except AssertionError:
                rejected += 1
    assert rejected >= 3, f"{invariant} let {broken.__name__} pass"  # type: ignore[attr-defined]  # functions have names


@given(x=weights(max_count=4 * BLOCK * 256 // 64))
@SOME
def test_powers_of_two_commute_with_double_quantization_too(x: Tensor) -> None:
    check_powers_of_two(ours(double_quant=True), x)
    check_powers_of_two(theirs(double_quant=True), x)


@given(x=weights(multiple_of=BLOCK))
@SOME
def test_codes_are_local_even_under_double_quantization(x: Tensor) -> None:
    changed = x.clone()
    changed[:BLOCK] = 1
    before, after = ours(double_quant=True)(x), ours(double_quant=True)(changed)
    assert torch.equal(before.codes[BLOCK:], after.codes[BLOCK:])


@given(
    rows=st.integers(1, 5),
    out_features=st.integers(1, 6),
    in_blocks=st.integers(1, 3),
    seed=st.integers(0, 2**16),
    double_quant=st.booleans(),
)
@SOME
def test_matmul_is_the_dense_one_with_the_decoded_weight(  # I12
    rows: int, out_features: int, in_blocks: int, seed: int, double_quant: bool
) -> None:
    in_features = in_blocks * BLOCK + (1 if out_features == in_blocks * BLOCK else 0)
    weight = make_weights("normal", out_features * in_features, seed=seed).view(out_features, in_features)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    dense = ours(double_quant=double_quant)(weight).decoded
    x = make_weights("normal", rows * in_features, seed=seed + 1).view(rows, in_features).requires_grad_()
    y = bitsandbytes.matmul_4bit(x, packed, quant_state=state)
    assert same_bits(y, torch.nn.functional.linear(x, dense))
    grad = make_weights("normal", y.numel(), seed=seed + 2).view_as(y)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    assert same_bits(grad_x, grad @ dense)
    control = ours(double_quant=double_quant)(weight.flip(0)).decoded
    assert out_features == 1 or not torch.equal(y, torch.nn.functional.linear(x, control))


# What must not be asserted: the same checks, shown to fail, so that nobody adds them.


def test_negation_does_not_commute_because_the_codebook_is_asymmetric() -> None:
    x = make_weights("normal", 640, seed=0)
    assert not torch.equal(ours()(-x).decoded, -ours()(x).decoded)


def test_double_quantization_may_flip_the_signs_of_a_small_block() -> None:
    flipped = 0
    for seed in range(60):
        x = make_weights("normal", 40 * BLOCK, seed=seed)
        x[:BLOCK] *= 1e-4
        x[-BLOCK:] *= 3  # so that the small block is not the one farthest from the mean
        flipped += bool((ours(double_quant=True)(x).absmax < 0).any())
    assert flipped, "no negative scale in 60 tensors: double quantization changed"


@pytest.mark.parametrize("exponent", [-127, -130])
def test_idempotence_ends_where_the_scale_is_subnormal(exponent: int) -> None:
    x = make_weights("uniform", BLOCK, seed=0) * 2.0**exponent
    x[0] = 2.0**exponent
    with pytest.raises(AssertionError):
        check_idempotent(ours(), x)
    assert torch.equal(ours()(x).codes, theirs()(x).codes)


def test_the_tiniest_blocks_vanish() -> None:
    x = torch.full((BLOCK,), 2.0**-145)
    assert (ours()(x).decoded == 0).all()
    assert (theirs()(x).decoded == 0).all()
