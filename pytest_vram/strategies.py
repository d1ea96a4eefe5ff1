"""Hypothesis strategies for what memory depends on: batch shapes, adapters, quantization, windows of rows, NF4 blocks.

::

    from pytest_vram import strategies as vram

    @given(shape=vram.batches(max_tokens=4096))
    @pytest.mark.vram(max_gb=16, search=True)
    def test_any_batch_fits(gpu, shape): ...

With the marker, each example is measured separately, and the largest peak is compared with the budget. ``search=True``
passes the peak to ``hypothesis.target``: hypothesis then looks for examples with a larger peak, and shrinks a failure
to the smallest batch that breaks the budget. All strategies shrink towards values that need less memory. Importing
this module needs hypothesis and nothing else.
"""

from __future__ import annotations

import itertools
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from pytest_vram.errors import VramUsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Names of the linear layers of Llama, Mistral, Qwen and Gemma."""

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The NF4 code book (Dettmers et al., QLoRA, https://arxiv.org/abs/2305.14314, appendix E)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """``rows`` sequences of ``seq`` tokens each, padding included."""

    rows: int
    seq: int

    @property
    def tokens(self) -> int:
        """Tokens in the batch, padding included."""
        return self.rows * self.seq

    @property
    def size(self) -> tuple[int, int]:
        """``(rows, seq)``, for ``torch.ones(shape.size, dtype=torch.long)``."""
        return (self.rows, self.seq)


_FEW_ROWS = 8


def batches(
    *, max_tokens: int, max_rows: int | None = None, max_seq: int | None = None, multiple_of: int = 1
) -> st.SearchStrategy[BatchShape]:
    """Generate shapes of at most ``max_tokens`` tokens. Large shapes are more frequent than small ones.

    Args:
        max_tokens: largest number of rows times tokens per row.
        max_rows: largest number of rows.
        max_seq: largest number of tokens per row.
        multiple_of: the tokens per row are a multiple of this number, as after a data loader's padding.

    Raises:
        VramUsageError: no shape meets these conditions.
    """
    _positive(max_tokens=max_tokens, max_rows=max_rows, max_seq=max_seq, multiple_of=multiple_of)
    longest = min(max_tokens, max_seq or max_tokens)
    if multiple_of > longest:
        raise VramUsageError(f"batches(multiple_of={multiple_of}) leaves no row: rows have at most {longest} tokens")
    most = min(max_tokens // multiple_of, max_rows or max_tokens)

    @st.composite
    def shape(draw: st.DrawFn) -> BatchShape:
        # Half of the shapes have few rows, because memory that grows with the square of the length shows in long rows.
        rows = draw(st.integers(1, min(_FEW_ROWS, most)) | st.integers(1, most))
        units = min(longest, max_tokens // rows) // multiple_of
        # Taking the longest of three draws makes full batches frequent; the length still shrinks to the minimum.
        longest_units = max(draw(st.tuples(*[st.integers(1, units)] * 3)))
        return BatchShape(rows=rows, seq=multiple_of * longest_units)

    return shape()


def lengths(*, max_tokens: int, count: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Generate the lengths of ``count`` sequences that together have at most ``max_tokens`` tokens, each at least one.

    Use it where sequences share a limit, as a question and its document do. Each length is drawn as a share of what
    the earlier ones leave, so hypothesis can change one of them without breaking the limit. A search needs that: with
    ``integers(1, max_tokens - first)`` for the second length, a longer first one makes the second invalid, hypothesis
    replaces it by 1, and the climb ends there.

    Args:
        max_tokens: largest sum of the lengths.
        count: number of sequences.

    Raises:
        VramUsageError: there are more sequences than tokens, or one of the numbers is not positive.
    """
    _positive(max_tokens=max_tokens, count=count)
    if count > max_tokens:
        raise VramUsageError(f"lengths(max_tokens={max_tokens}, count={count}) leaves some sequences without a token")

    @st.composite
    def several(draw: st.DrawFn) -> tuple[int, ...]:
        found: list[int] = []
        for to_come in reversed(range(count)):
            room = max_tokens - sum(found) - to_come  # each of the sequences to come needs one token
            share = draw(st.integers(1, max_tokens))
            found.append(max(1, share * room // max_tokens))
        return tuple(found)

    return several()


def lora_configs(
    *, max_rank: int = 64, layers: Sequence[str] = LINEAR_LAYERS, dropout: bool = True, dora: bool = True
) -> st.SearchStrategy[dict[str, Any]]:
    """Generate keyword arguments for ``peft.LoraConfig``: rank, alpha, layers, dropout, rsLoRA, DoRA.

    Args:
        max_rank: largest rank; powers of two are more frequent than other ranks.
        layers: names to choose ``target_modules`` from, at least one.
        dropout: whether some examples have dropout, which keeps a mask for the backward pass.
        dora: whether some examples use DoRA, which keeps the norm of the merged weight.
    """
    _positive(max_rank=max_rank)
    if not layers:
        raise VramUsageError("lora_configs(layers=()) leaves nothing to adapt: name at least one layer")
    powers = [2**k for k in range(max_rank.bit_length()) if 2**k <= max_rank]
    return st.fixed_dictionaries(
        {
            "r": st.sampled_from(powers) | st.integers(1, max_rank),
            "lora_alpha": st.sampled_from([8, 16, 32, 64]),
            "target_modules": st.lists(st.sampled_from(list(layers)), min_size=1, unique=True).map(sorted),
            "lora_dropout": st.sampled_from([0.0, 0.05, 0.1]) if dropout else st.just(0.0),
            "use_rslora": st.booleans(),
            "use_dora": st.booleans() if dora else st.just(False),
        }
    )


def quantizations(
    *, compute_dtypes: Sequence[str] = ("bfloat16", "float16", "float32")
) -> st.SearchStrategy[dict[str, Any]]:
    """Generate keyword arguments for ``transformers.BitsAndBytesConfig``: nf4 and fp4, with and without double
    quantization, and int8.

    Args:
        compute_dtypes: names of the dtypes that 4-bit layers may compute in.
    """
    four_bit = st.fixed_dictionaries(
        {
            "load_in_4bit": st.just(True),
            "bnb_4bit_quant_type": st.sampled_from(["nf4", "fp4"]),
            "bnb_4bit_use_double_quant": st.sampled_from([True, False]),
            "bnb_4bit_compute_dtype": st.sampled_from(list(compute_dtypes)),
        }
    )
    # Both cases draw the same values. With ``a | b``, hypothesis would shrink to the case with fewer draws, whichever
    # needs less memory.
    return st.builds(
        lambda eight, settings: {"load_in_8bit": True} if eight else settings, st.sampled_from([False, True]), four_bit
    )


def windows(
    *, max_rows: int = 16, max_seq: int = 512, max_micro_batch: int = 4
) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    """Generate windows of gradient accumulation: the rows' lengths in tokens, grouped by micro-batch.

    ``((7, 512), (3,))`` is a window of three rows in micro-batches of two. The last micro-batch may be smaller.

    Args:
        max_rows: largest number of rows in a window.
        max_seq: largest number of tokens in a row.
        max_micro_batch: largest number of rows in a micro-batch.
    """
    _positive(max_rows=max_rows, max_seq=max_seq, max_micro_batch=max_micro_batch)

    @st.composite
    def window(draw: st.DrawFn) -> tuple[tuple[int, ...], ...]:
        size = draw(st.integers(1, max_micro_batch))
        lengths = draw(st.lists(st.integers(1, max_seq), min_size=1, max_size=max_rows))
        return tuple(tuple(lengths[i : i + size]) for i in range(0, len(lengths), size))

    return window()


def nf4_blocks(*, blocksize: int = 64, max_exponent: int = 20) -> st.SearchStrategy[tuple[float, ...]]:
    """Generate blocks of float32 values that are hard for a 4-bit codec.

    A block is constant, sparse or mixed. Its values are zeros, values of the code book, the thresholds between two of
    them, the float32 values on either side of a threshold, or arbitrary, at scales over many orders of magnitude.

    Args:
        blocksize: values in a block.
        max_exponent: scales go from ``10**-max_exponent`` to ``10**max_exponent``; at most 37.
    """
    _positive(blocksize=blocksize, max_exponent=max_exponent)
    thresholds = [(low + high) / 2 for low, high in itertools.pairwise(NF4)]
    near = [_float32_step(t, steps) for t in thresholds for steps in (-1, 0, 1)]
    units = st.one_of(
        st.just(0.0),
        st.sampled_from(NF4),
        st.sampled_from(near),
        st.floats(-1, 1, width=32),
    )
    scales = st.just(1.0) | st.integers(-max_exponent, max_exponent).map(lambda k: 10.0**k)

    def scaled(block: list[float], scale: float) -> tuple[float, ...]:
        return tuple(_float32(value * scale) for value in block)

    mixed = st.lists(units, min_size=blocksize, max_size=blocksize)
    constant = units.map(lambda value: [value] * blocksize)
    sparse = st.builds(
        lambda position, value: [value if i == position else 0.0 for i in range(blocksize)],
        st.integers(0, blocksize - 1),
        units,
    )
    return st.builds(scaled, constant | sparse | mixed, scales)


def _positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise VramUsageError(f"{name}={value!r}: write a number from 1 on")


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _float32_step(value: float, steps: int) -> float:
    """Round ``value`` to float32 and move its magnitude by ``steps`` float32 values."""
    rounded = _float32(value)
    bits = struct.unpack("<i", struct.pack("<f", abs(rounded)))[0] + (steps if rounded >= 0 else -steps)
    return math.copysign(struct.unpack("<f", struct.pack("<i", bits))[0], rounded)
