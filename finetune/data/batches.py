"""Examples, batches and their order. The seed and N alone decide which rows step N trains on.

A window holds the rows of one optimizer step. Its gradient does not depend on how it is split into micro-batches, so
its rows are sorted by length, the longest first. That leaves little padding and puts the largest micro-batch first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from finetune.data.encode import IGNORED
from finetune.data.packing import Sequences, lengths_of_rows, pack
from finetune.data.tokens import Counts, tokenized

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import datasets
    from numpy.typing import NDArray
    from torch import Tensor

    from finetune.config.settings import DataConfig, TrainConfig

_HELD_OUT, _ORDER = 1, 2  # part of a generator's seed, one for each use, so that no two uses draw the same numbers
_SHOWN_BAD_ROWS = 20
_SHOWN_COLUMNS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row as tokens."""

    input_ids: NDArray[np.int32]
    """[tokens]"""
    labels: NDArray[np.int32]
    """[tokens]: the token's id if the loss is taken on it, else -100."""
    source: str
    """Where the row comes from: ``file:line``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch: b sequences of t tokens."""

    input_ids: Tensor
    """int64 [b, t]"""
    labels: Tensor
    """int64 [b, t]: the label at position i is the target of the hidden state at i - 1; -100 means no target."""
    attention_mask: Tensor | None = None
    """int64 [b, t]: 1 on real tokens, 0 on padding; None if there is no padding."""
    position_ids: Tensor | None = None
    """int64 [b, t]: positions that start at 0 again with every row of a packed sequence; None without packing."""
    row_lengths: tuple[int, ...] | None = None
    """Tokens of each row of all sequences, one after the other; padding counts as rows of its own. None finds them from
    the positions when the batch is made, and stays None without positions. `to` keeps them, so that positions are never
    read from a GPU."""
    padded_right: bool | None = None
    """Whether all padding comes after the tokens of its sequence, where causal attention never looks at it. None finds
    this from the mask when the batch is made. `to` keeps the answer, so that the mask is never read from a GPU."""

    def __post_init__(self) -> None:
        if self.padded_right is None:
            mask = self.attention_mask
            found = mask is None or bool((mask[:, 1:] <= mask[:, :-1]).all())
            object.__setattr__(self, "padded_right", found)
        if self.row_lengths is None and self.position_ids is not None:
            object.__setattr__(self, "row_lengths", lengths_of_rows(self.position_ids))

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    @property
    def targets(self) -> int:
        """Number of tokens that the loss is taken on, after the shift by one position."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def widened(self, multiple: int, most: int | None) -> Batch:
        """Return the batch with padding up to the next multiple of tokens.

        Triton compiles a kernel anew for a size that is a multiple of 16 if it knows it for other sizes only, and the
        other way round. A batch in which rows are packed, or padded on the left, stays as it is.

        Args:
            multiple: of tokens.
            most: the most tokens that a row may have; None for no limit. A batch that would be wider stays as it is.
        """
        width = self.input_ids.shape[1]
        more = -width % multiple
        if not more or not self.padded_right or self.position_ids is not None or (most and width + more > most):
            return self
        mask = torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask
        again = self.input_ids[:, -1:].expand(-1, more)  # an id that the model surely has
        return Batch(
            input_ids=torch.cat([self.input_ids, again], dim=1),
            labels=F.pad(self.labels, (0, more), value=IGNORED),
            attention_mask=F.pad(mask, (0, more)),
            padded_right=True,
        )

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to another device. A copy from pinned memory is asynchronous."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return Batch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            attention_mask=moved(self.attention_mask),
            position_ids=moved(self.position_ids),
            padded_right=self.padded_right,
            row_lengths=self.row_lengths,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleSet:
    """Rows of a memory-mapped token file, in a fixed order, and the sequences that they form."""

    rows: datasets.Dataset
    """Columns input_ids, labels, length, targets, source."""
    index: NDArray[np.int64]
    """[rows of the set]: their numbers in ``rows``."""
    lengths: NDArray[np.int32]
    """[rows of the set]: tokens of each."""
    sequences: Sequences
    """The rows of each sequence; without packing each row has its own."""
    fingerprint: str
    """Digest of the file's tokens and of ``index``."""
    pad_id: int
    """Id of the token that pads a batch. A real token may have the same id; the attention mask tells them apart."""
    packed: bool
    """Whether a sequence may hold several rows."""

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Example:
        row = self.rows[int(self.index[number])]
        return Example(
            input_ids=np.asarray(row["input_ids"], np.int32),
            labels=np.asarray(row["labels"], np.int32),
            source=row["source"],
        )

    def batch(self, sequences: Sequence[int]) -> Batch:
        """Return the sequences with these numbers as one micro-batch."""
        lines = [[self[int(row)] for row in self.sequences[s]] for s in sequences]
        return collate(lines, self.pad_id, packed=self.packed)

    def sequence_lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each sequence, [sequences]."""
        return np.add.reduceat(self.lengths[self.sequences.rows].astype(np.int64), self.sequences.starts)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataStats:
    """How many rows and tokens there are, and what was cut or skipped. ``str()`` gives the text that a user sees."""

    train: Counts
    held_out: Counts | None
    """Counts of --eval-data; None if rows were held out of --data."""
    train_rows: int
    held_out_rows: int
    train_tokens: int
    train_sequences: int
    """Sequences of one epoch: as many as rows, or fewer with packing."""
    longest: int
    """Tokens of the longest training row."""

    def __str__(self) -> str:
        parts = [f"{self.train_rows:,} training rows ({self.train_tokens:,} tokens, longest {self.longest:,})"]
        if self.train_sequences != self.train_rows:
            parts.append(f"packed into {self.train_sequences:,} sequences")
        parts.append(f"{self.held_out_rows:,} held out")
        text = ", ".join(parts)
        for name, counts in (("--data", self.train), ("--eval-data", self.held_out)):
            if counts is not None:
                text += _told(name, counts)
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSplit:
    """The rows that are trained on, and the rows that are held out for evaluation."""

    train: ExampleSet
    held_out: ExampleSet
    stats: DataStats


def load_examples(config: DataConfig, tokenizer: Any, *, seed: int) -> DataSplit:
    """Read, tokenize and split the rows.

    Args:
        config: names the sources, and says how rows become tokens.
        tokenizer: the tokenizer of the model.
        seed: decides which rows are held out, and which rows share a packed sequence.

    Returns:
        Both sets and the counts. The held-out set is empty if ``eval_fraction`` is 0 or the data has only one row.

    Raises:
        DataError: a row cannot be used (the message has its file and line), or no row is left.
    """
    rows, counts = tokenized(config.data, config, tokenizer)
    everything = np.arange(len(rows), dtype=np.int64)
    eval_counts: Counts | None = None
    if config.eval_data is not None:
        held_rows, eval_counts = tokenized(config.eval_data, config, tokenizer)
        train_index, held_index = everything, np.arange(len(held_rows), dtype=np.int64)
        held_print = eval_counts.fingerprint
    else:
        held_rows, held_print = rows, counts.fingerprint
        train_index, held_index = _split(everything, config.eval_fraction, seed)
    train = _example_set(rows, train_index, counts.fingerprint, tokenizer, config, seed)
    held_out = _example_set(held_rows, held_index, held_print, tokenizer, config, seed)
    stats = DataStats(
        train=counts,
        held_out=eval_counts,
        train_rows=len(train),
        held_out_rows=len(held_out),
        train_tokens=int(train.lengths.sum()),
        train_sequences=len(train.sequences),
        longest=int(train.lengths.max()),
    )
    return DataSplit(train=train, held_out=held_out, stats=stats)


def collate(sequences: Sequence[Sequence[Example]], pad_id: int, *, packed: bool) -> Batch:
    """Make a batch of sequences, padded on the right to the longest of them.

    Args:
        sequences: the examples of each sequence. The first token of an example is never a target.
        pad_id: id of the token that pads. Padding has the label -100; with ``packed`` its positions start at 0 again,
            so that no example attends to it.
        packed: write positions that start at 0 with every example, by which models keep their attention apart.
    """
    width = max(sum(len(example.input_ids) for example in sequence) for sequence in sequences)
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    labels = torch.full((len(sequences), width), IGNORED, dtype=torch.int64)
    mask = torch.zeros((len(sequences), width), dtype=torch.int64)
    positions = torch.arange(width).repeat(len(sequences), 1)
    for line, sequence in enumerate(sequences):
        begin = 0
        for example in sequence:
            end = begin + len(example.input_ids)
            input_ids[line, begin:end] = torch.from_numpy(example.input_ids.astype(np.int64))
            labels[line, begin:end] = torch.from_numpy(example.labels.astype(np.int64))
            labels[line, begin] = IGNORED
            positions[line, begin:] = torch.arange(width - begin)
            begin = end
        if begin < width:  # padding gets positions that a row has: a table of learned positions may hold no larger ones
            longest = max(len(example.input_ids) for example in sequence)
            positions[line, begin:] = torch.arange(width - begin) % longest
        mask[line, :begin] = 1
    return Batch(
        input_ids=input_ids,
        labels=labels,
        attention_mask=None if bool(mask.all()) else mask,
        position_ids=positions if packed else None,
    )


def windows_per_epoch(train: ExampleSet, config: TrainConfig) -> int:
    """Return the optimizer steps of one pass over the rows. The last window may be smaller than the others."""
    return math.ceil(len(train.sequences) / (config.micro_batch * config.accumulation))


def total_steps(train: ExampleSet, config: TrainConfig) -> int:
    """Return the optimizer steps of a run: ``max_steps`` if given, else those of ``epochs`` passes, rounded up."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, math.ceil(config.epochs * windows_per_epoch(train, config) - 1e-9))


def window_sequences(train: ExampleSet, config: TrainConfig, step: int) -> NDArray[np.int64]:
    """Return the numbers of the sequences that a step trains on, the longest first.

    They depend on the seed and the step alone. Every epoch has its own permutation of the sequences, and each sequence
    is in exactly one window of an epoch.

    Args:
        train: the training rows.
        config: for the seed and the size of a window.
        step: number of the step, from 0.
    """
    epoch, number = divmod(step, windows_per_epoch(train, config))
    order = np.random.default_rng([_ORDER, config.seed, epoch]).permutation(len(train.sequences))
    size = config.micro_batch * config.accumulation
    chosen = order[number * size : (number + 1) * size]
    lengths = np.array([int(train.lengths[train.sequences[s]].sum()) for s in chosen])
    return np.asarray(chosen[np.argsort(-lengths, kind="stable")], dtype=np.int64)


def windows(train: ExampleSet, config: TrainConfig, *, start_step: int = 0) -> Iterator[list[Batch]]:
    """Yield the windows of the steps from ``start_step`` to the last of the run, each as a list of micro-batches."""
    for step in range(start_step, total_steps(train, config)):
        chosen = window_sequences(train, config, step)
        yield [
            train.batch([int(s) for s in chosen[i : i + config.micro_batch]])
            for i in range(0, len(chosen), config.micro_batch)
        ]


class Rows(Protocol):
    """What the window that takes the most memory is made from: an :class:`ExampleSet`, or the rows of a dry run."""

    def sequence_lengths(self) -> NDArray[Any]:
        """Return the number of tokens of each sequence."""

    def batch(self, sequences: Sequence[int]) -> Batch:
        """Return the sequences with these numbers as one micro-batch."""


def longest_window(train: Rows, config: TrainConfig) -> list[Batch]:
    """Return the window that takes the most memory: micro-batches of the longest sequences.

    With accumulation it has two, because the second one runs while the gradients of the first are held.
    """
    order = np.argsort(-train.sequence_lengths(), kind="stable")[: config.micro_batch]
    batch = train.batch([int(s) for s in order])
    return [batch] * (2 if config.accumulation > 1 else 1)


def batches(examples: ExampleSet, *, micro_batch: int) -> Iterator[Batch]:
    """Yield every sequence of a set once, in micro-batches, the longest first."""
    order = np.argsort(-examples.sequence_lengths(), kind="stable")
    for begin in range(0, len(order), micro_batch):
        yield examples.batch([int(s) for s in order[begin : begin + micro_batch]])


def _split(index: NDArray[np.int64], fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split rows into training and held-out rows, each in the order of the source.

    With two rows or more, each part gets at least one; a ``fraction`` of 0 holds none out.
    """
    count = min(len(index) - 1, max(1, round(fraction * len(index)))) if fraction > 0 else 0
    held = np.sort(np.random.default_rng([_HELD_OUT, seed]).permutation(index)[:count])
    return np.setdiff1d(index, held), held


def _example_set(
    rows: datasets.Dataset, index: NDArray[np.int64], fingerprint: str, tokenizer: Any, config: DataConfig, seed: int
) -> ExampleSet:
    import hashlib

    lengths = np.asarray(rows.with_format("numpy")["length"][:], dtype=np.int32)[index]
    sequences = pack(lengths, config.seq, seed=seed) if config.packing else Sequences.one_each(len(index))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    digest = hashlib.sha256(fingerprint.encode() + index.tobytes()).hexdigest()[:16]
    return ExampleSet(
        rows=rows,
        index=index,
        lengths=lengths,
        sequences=sequences,
        fingerprint=digest,
        pad_id=int(pad_id),
        packed=config.packing,
    )


def _told(name: str, counts: Counts) -> str:
    text = ""
    if counts.truncated:
        text += f"\n{name}: {counts.truncated:,} rows cut to --seq, {counts.tokens_cut:,} tokens lost"
    if counts.without_target:
        text += f"\n{name}: {counts.without_target:,} rows left out: nothing to learn within --seq tokens"
    for what, count in counts.unused[:_SHOWN_COLUMNS]:
        text += f"\n{name}: rows have {what} that the prompt leaves out ({count:,} of {counts.rows:,} rows)"
    if len(counts.unused) > _SHOWN_COLUMNS:
        text += f"\n{name}: ... and {len(counts.unused) - _SHOWN_COLUMNS:,} more columns and keys"
    if counts.bad:
        shown = counts.listed[:_SHOWN_BAD_ROWS]
        text += f"\n{name}: {counts.bad:,} bad rows skipped" + "".join(f"\n  {row}" for row in shown)
        if counts.bad > len(shown):
            text += f"\n  ... and {counts.bad - len(shown):,} more"
    return text
