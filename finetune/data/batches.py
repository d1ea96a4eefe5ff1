"""Examples, batches, and their order: which rows make up step N is a pure function of the seed and N.

A window is what one optimizer step sees. How it is split into micro-batches changes no gradient, so its rows are sorted
by length, the longest first: little padding, and the largest micro-batch comes first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finetune.data.encode import IGNORED
from finetune.data.packing import Sequences, pack
from finetune.data.tokens import Counts, tokenized

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import datasets
    from numpy.typing import NDArray
    from torch import Tensor

    from finetune.config.settings import DataConfig, TrainConfig

_HELD_OUT, _ORDER = 1, 2  # what a random generator is for, so that no two draw the same numbers
_SHOWN_BAD_ROWS = 20
_SHOWN_COLUMNS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row as tokens."""

    input_ids: NDArray[np.int32]
    """[tokens]"""
    labels: NDArray[np.int32]
    """[tokens]: the token itself where the loss is taken on it, else -100."""
    source: str
    """Where the row is: ``file:line``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows side by side: one micro-batch."""

    input_ids: Tensor
    """int64 [b, t]"""
    labels: Tensor
    """int64 [b, t]: the token at position i is the target of the hidden state at i - 1; -100 is none."""
    attention_mask: Tensor | None = None
    """int64 [b, t]: 1 on real tokens; None where every token is one."""
    position_ids: Tensor | None = None
    """int64 [b, t]: start anew with every row of a packed sequence; None where they simply count up."""
    padded_right: bool | None = None
    """Whether padding, if there is any, comes after each row's tokens: causal attention never looks at it then. Found
    from the mask where it is not given, and kept by `to`: a GPU is never asked for it."""

    def __post_init__(self) -> None:
        if self.padded_right is None:
            mask = self.attention_mask
            found = mask is None or bool((mask[:, 1:] <= mask[:, :-1]).all())
            object.__setattr__(self, "padded_right", found)

    @property
    def tokens(self) -> int:
        """Real tokens, padding left out."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    @property
    def targets(self) -> int:
        """Tokens that the loss is taken on, after the shift by one."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; copies from pinned memory do not wait."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return Batch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            attention_mask=moved(self.attention_mask),
            position_ids=moved(self.position_ids),
            padded_right=self.padded_right,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleSet:
    """Rows of a memory-mapped token file, in a fixed order, and the sequences they are put into."""

    rows: datasets.Dataset
    """Columns input_ids, labels, length, targets, source."""
    index: NDArray[np.int64]
    """Which of the rows belong to this set."""
    lengths: NDArray[np.int32]
    """Tokens of each row of the set."""
    sequences: Sequences
    """Which of the set's rows share a sequence: one each without packing."""
    fingerprint: str
    """Digest of the tokens and of which of them are in this set."""
    pad_id: int
    """Token that fills a batch up; never told apart by its value."""
    packed: bool
    """Whether sequences hold several rows."""

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
        """The named sequences as one micro-batch."""
        lines = [[self[int(row)] for row in self.sequences[s]] for s in sequences]
        return collate(lines, self.pad_id, packed=self.packed)

    def sequence_lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence."""
        return np.add.reduceat(self.lengths[self.sequences.rows].astype(np.int64), self.sequences.starts)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataStats:
    """What came of the rows; as text, what a user wants to know before training."""

    train: Counts
    held_out: Counts | None
    """Counts of --eval-data; None where rows were held out of --data."""
    train_rows: int
    held_out_rows: int
    train_tokens: int
    train_sequences: int
    """Sequences an epoch consists of: as many as rows, fewer with packing."""
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
    """What is trained on and what is only looked at."""

    train: ExampleSet
    held_out: ExampleSet
    stats: DataStats


def load_examples(config: DataConfig, tokenizer: Any, *, seed: int) -> DataSplit:
    """Read, tokenize and split the rows.

    Args:
        config: where the rows are and what becomes of them.
        tokenizer: the model's.
        seed: which rows are held out, and which share a packed sequence.

    Returns:
        Both sets and the counts. The held-out set is empty where ``eval_fraction`` is 0 or there is but one row.

    Raises:
        DataError: a row cannot be used, with file and line; or none is left.
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
    """Sequences of one or more examples as a batch, filled up on the right.

    Args:
        sequences: for each line of the batch the examples in it.
        pad_id: what fills a line up. Labels there are -100, and positions (packed) start anew, so that no row sees it.
        packed: write positions that start anew with every example, which keeps their attention apart. The first token
            of an example is no target of the one before it.
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
        if begin < width:  # no position that no row has: a table of learned positions may end there
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
    """Optimizer steps of one pass over the rows; the last window may be smaller than the others."""
    return math.ceil(len(train.sequences) / (config.micro_batch * config.accumulation))


def total_steps(train: ExampleSet, config: TrainConfig) -> int:
    """Optimizer steps of a run: ``max_steps``, else ``epochs`` passes, the last one begun counting in whole steps."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, math.ceil(config.epochs * windows_per_epoch(train, config) - 1e-9))


def window_sequences(train: ExampleSet, config: TrainConfig, step: int) -> NDArray[np.int64]:
    """Which sequences step ``step`` (from 0) trains on, the longest first: a function of the seed and the step alone.

    Every epoch is a permutation of its own, and every sequence is in exactly one window of an epoch.
    """
    epoch, number = divmod(step, windows_per_epoch(train, config))
    order = np.random.default_rng([_ORDER, config.seed, epoch]).permutation(len(train.sequences))
    size = config.micro_batch * config.accumulation
    chosen = order[number * size : (number + 1) * size]
    lengths = np.array([int(train.lengths[train.sequences[s]].sum()) for s in chosen])
    return np.asarray(chosen[np.argsort(-lengths, kind="stable")], dtype=np.int64)


def windows(train: ExampleSet, config: TrainConfig, *, start_step: int = 0) -> Iterator[list[Batch]]:
    """The windows of the steps from ``start_step`` to the run's last, each a list of micro-batches."""
    for step in range(start_step, total_steps(train, config)):
        chosen = window_sequences(train, config, step)
        yield [
            train.batch([int(s) for s in chosen[i : i + config.micro_batch]])
            for i in range(0, len(chosen), config.micro_batch)
        ]


def longest_window(train: ExampleSet, config: TrainConfig) -> list[Batch]:
    """The dearest micro-batch that any order of the rows can make, twice where a window has more than one.

    Twice, because the second runs while the first one's gradients are held.
    """
    order = np.argsort(-train.sequence_lengths(), kind="stable")[: config.micro_batch]
    batch = train.batch([int(s) for s in order])
    return [batch] * (2 if config.accumulation > 1 else 1)


def batches(examples: ExampleSet, *, micro_batch: int) -> Iterator[Batch]:
    """Every sequence of a set once, the longest first."""
    order = np.argsort(-examples.sequence_lengths(), kind="stable")
    for begin in range(0, len(order), micro_batch):
        yield examples.batch([int(s) for s in order[begin : begin + micro_batch]])


def _split(index: NDArray[np.int64], fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and held-out rows, each in the source's order; at least one of each where there are two."""
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
