"""Keeps a tokenized data set in one Arrow file, which is memory-mapped, so that it may be larger than memory.

The file is made once for each source, tokenizer and set of settings that shape tokens. It is kept in the user's cache,
and appears there only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.encode import encode, targets
from finetune.data.rows import BadRowError, read_rows, source_fingerprint
from finetune.disk.cache import cache_folder
from finetune.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import datasets

    from finetune.config.settings import DataConfig
    from finetune.data.encode import Encoded

FORMAT = 3
"""Version of the tokens. Raise it when a change makes other tokens of the same row: older caches are not read then."""
LISTED = 100
"""How many bad rows are listed with their error; further ones are only counted."""
_TOKENS, _COUNTS = "tokens.arrow", "counts.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How many rows of a source were kept, cut and skipped, and which rows are extreme."""

    rows: int
    """Rows read."""
    bad: int
    """Rows that could not be used and were skipped."""
    listed: tuple[str, ...]
    """The first of the bad rows, each with its place, the error, and the beginning of the row."""
    truncated: int
    """Rows cut to ``--seq`` tokens."""
    tokens_cut: int
    """Tokens that were cut off."""
    without_target: int
    """Rows left out because no token of the answer is within ``--seq`` tokens."""
    unused: tuple[tuple[str, int], ...]
    """Columns and keys that are not used, in words, each with the number of rows that have it."""
    largest_id: int
    """The largest token id of the rows that were kept."""
    largest_id_source: str
    """The first row that has this id: ``file:line``."""
    longest: int
    """Tokens of the longest row that was kept."""
    longest_source: str
    """The first row of that length: ``file:line``."""
    fingerprint: str
    """Digest of every token and label that was kept, in order."""


def tokenized(data: str, config: DataConfig, tokenizer: Any) -> tuple[datasets.Dataset, Counts]:
    """Tokenize the rows of a source, or take them from the cache.

    Args:
        data: a file, a hub name, or ``docstrings``.
        config: ``seq``, ``train_on_prompt`` and ``skip_bad_rows`` are used.
        tokenizer: the tokenizer of the model.

    Returns:
        A memory-mapped set with the columns input_ids, labels, length, targets and source; and the counts.

    Raises:
        DataError: a row cannot be used (without ``skip_bad_rows``), or no row is left.
    """
    import datasets

    folder = cache_folder() / "data" / _key(data, config, tokenizer)
    if not (folder / _COUNTS).is_file():
        _write(folder, data, config, tokenizer)
    counts = json.loads((folder / _COUNTS).read_text())
    counts |= {"listed": tuple(counts["listed"]), "unused": tuple((what, count) for what, count in counts["unused"])}
    return datasets.Dataset.from_file(str(folder / _TOKENS)), Counts(**counts)


def _write(folder: Path, data: str, config: DataConfig, tokenizer: Any) -> None:
    """Tokenize a source into a temporary folder beside ``folder``, and rename it when it is complete."""
    from datasets import Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features(
        {
            "input_ids": Sequence(Value("int32")),
            "labels": Sequence(Value("int32")),
            "length": Value("int32"),
            "targets": Value("int32"),
            "source": Value("string"),
        }
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        tally = _Tally()
        with ArrowWriter(features=features, path=str(aside / _TOKENS), writer_batch_size=256) as writer:
            for example in _examples(data, config, tokenizer, tally):
                writer.write(example)
            if not tally.kept:
                raise DataError(f"data = {data!r}: no row to train on; {_nothing_left(tally.counts())}")
            writer.finalize()
        (aside / _COUNTS).write_text(json.dumps(asdict(tally.counts())))
        try:
            aside.rename(folder)
        except OSError:  # another run finished the same set first
            if not (folder / _COUNTS).is_file():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class _Tally:
    """Counts the rows while they are tokenized."""

    def __init__(self) -> None:
        self.rows = self.bad = self.truncated = self.tokens_cut = self.without_target = self.kept = 0
        self.listed: list[str] = []
        self.unused: Counter[str] = Counter()
        self.largest_id, self.largest_id_source = -1, ""
        self.longest, self.longest_source = 0, ""
        self.digest = hashlib.sha256()

    def keep(self, coded: Encoded, source: str) -> None:
        """Count a row that is kept, to be trained on or held out."""
        self.kept += 1
        largest, length = int(coded.input_ids.max()), len(coded.input_ids)
        if largest > self.largest_id:
            self.largest_id, self.largest_id_source = largest, source
        if length > self.longest:
            self.longest, self.longest_source = length, source
        self.digest.update(coded.input_ids.tobytes())
        self.digest.update(coded.labels.tobytes())

    def counts(self) -> Counts:
        return Counts(
            rows=self.rows,
            bad=self.bad,
            listed=tuple(self.listed),
            truncated=self.truncated,
            tokens_cut=self.tokens_cut,
            without_target=self.without_target,
            unused=tuple(self.unused.items()),
            largest_id=self.largest_id,
            largest_id_source=self.largest_id_source,
            longest=self.longest,
            longest_source=self.longest_source,
            fingerprint=self.digest.hexdigest()[:16],
        )


def _examples(data: str, config: DataConfig, tokenizer: Any, tally: _Tally) -> Iterator[dict[str, Any]]:
    for row in read_rows(data):
        tally.rows += 1
        try:
            coded = encode(row, tokenizer, config)
        except BadRowError as error:
            told = f"{row.source}: {error}. The row begins: {row.beginning()}"
            if not config.skip_bad_rows:
                raise DataError(f"{told}\nMend the row, or count and list such rows with --skip-bad-rows") from None
            tally.bad += 1
            if len(tally.listed) < LISTED:
                tally.listed.append(told)
            continue
        tally.unused.update(coded.unused)
        tally.truncated += coded.cut > 0
        tally.tokens_cut += coded.cut
        learned = targets(coded.labels)
        if not learned:
            tally.without_target += 1
            continue
        tally.keep(coded, row.source)
        yield {
            "input_ids": coded.input_ids,
            "labels": coded.labels,
            "length": len(coded.input_ids),
            "targets": learned,
            "source": row.source,
        }


def _nothing_left(counts: Counts) -> str:
    """Return the reason why no row is left."""
    if not counts.rows:
        return "it holds no rows"
    reasons = []
    if counts.bad:
        reasons.append(f"{counts.bad:,} cannot be used (the first is {counts.listed[0]})")
    if counts.without_target:
        verb = "has" if counts.without_target == 1 else "have"
        reasons.append(
            f"{counts.without_target:,} {verb} nothing to learn within --seq tokens (raise --seq if an answer begins "
            "behind it)"
        )
    return f"of {counts.rows:,} {'row' if counts.rows == 1 else 'rows'}, {' and '.join(reasons)}"


def _key(data: str, config: DataConfig, tokenizer: Any) -> str:
    # A hub set may have changed since the last run, so it gets a new key, and is tokenized again, every time.
    source = source_fingerprint(data) or os.urandom(16).hex()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    shape = [
        FORMAT,
        source,
        config.seq,
        config.train_on_prompt,
        config.skip_bad_rows,
        tokenizer.chat_template,
        [tokenizer.bos_token, tokenizer.eos_token, type(tokenizer).__name__],
        backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
    ]
    return hashlib.sha256(json.dumps(shape, default=str).encode()).hexdigest()[:32]
