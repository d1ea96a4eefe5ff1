"""A set of rows, its sequences, batches and windows: every token and target once an epoch, in an order that resumes."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import tiny_tokenizer

from finetune.config.settings import DataConfig, TrainConfig
from finetune.data.batches import (
    Batch,
    DataSplit,
    ExampleSet,
    batches,
    load_examples,
    longest_window,
    total_steps,
    window_sequences,
    windows,
    windows_per_epoch,
)
from finetune.data.encode import IGNORED, targets
from finetune.data.packing import pack
from finetune.data.rows import source_fingerprint
from finetune.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

FEW = settings(max_examples=settings.default.max_examples // 2)
LENGTHS = st.lists(st.integers(1, 40), min_size=2, max_size=30)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Loads rows whose answers have the given lengths, through a file and the token cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FINETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    folder = tmp_path_factory.mktemp("rows")

    def loaded(lengths: list[int], *, seed: int = 0, **changes: Any) -> DataSplit:
        rows = [
            {"prompt": f"{number}", "completion": "abcdefg"[number % 7] * length}
            for number, length in enumerate(lengths)
        ]
        path = folder / f"{abs(hash(tuple(lengths)))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(**{"data": str(path), "seq": 100} | changes)
        return load_examples(config, tiny_tokenizer(), seed=seed)

    yield loaded
    patch.undo()


def rows_of(examples: ExampleSet) -> Counter[tuple[Any, ...]]:
    return Counter(
        (tuple(e.input_ids.tolist()), targets(e.labels)) for e in (examples[i] for i in range(len(examples)))
    )


def rows_in(batch: Batch) -> list[tuple[tuple[int, ...], int]]:
    """The rows of a batch, told apart by its mask and positions alone."""
    found = []
    mask = batch.attention_mask if batch.attention_mask is not None else torch.ones_like(batch.input_ids)
    for line in range(len(batch.input_ids)):
        ids, labels = (t[line, mask[line] == 1].numpy() for t in (batch.input_ids, batch.labels))
        starts = [0]
        if batch.position_ids is not None:
            starts = np.flatnonzero(batch.position_ids[line, mask[line] == 1].numpy() == 0).tolist()
        for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert labels[begin] == IGNORED
            found.append((tuple(ids[begin:end].tolist()), targets(labels[begin:end])))
    return found


@given(
    lengths=LENGTHS,
    packing=st.booleans(),
    fraction=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    seed=st.integers(0, 50),
    seq=st.sampled_from([30, 100]),
)
@FEW
def test_every_row_is_trained_on_or_held_out_once(
    load: Any, lengths: list[int], packing: bool, fraction: float, seed: int, seq: int
) -> None:
    split = load(lengths, seed=seed, packing=packing, eval_fraction=fraction, seq=seq)
    everything = rows_of(load(lengths, eval_fraction=0.0, seq=seq).train)
    assert rows_of(split.train) + rows_of(split.held_out) == everything
    assert len(split.train) >= 1
    assert (len(split.held_out) >= 1) == (fraction > 0)
    counts = split.stats.train
    assert counts.rows == len(lengths) == len(split.train) + len(split.held_out) + counts.without_target
    for examples in (split.train, split.held_out):
        assert examples.lengths.tolist() == [len(examples[i].input_ids) for i in range(len(examples))]
        assert (examples.lengths <= seq).all()


@given(
    lengths=LENGTHS,
    packing=st.booleans(),
    micro_batch=st.integers(1, 4),
    accumulation=st.integers(1, 5),
    seed=st.integers(0, 50),
    train_on_prompt=st.booleans(),
)
@FEW
def test_an_epochs_windows_hold_every_token_and_target_once(
    load: Any,
    lengths: list[int],
    packing: bool,
    micro_batch: int,
    accumulation: int,
    seed: int,
    train_on_prompt: bool,
) -> None:
    train = load(lengths, packing=packing, eval_fraction=0.0, train_on_prompt=train_on_prompt).train
    config = TrainConfig(micro_batch=micro_batch, accumulation=accumulation, seed=seed)
    seen: Counter[tuple[Any, ...]] = Counter()
    per_epoch = windows_per_epoch(train, config)
    run = list(windows(train, config))
    assert len(run) == total_steps(train, config) == per_epoch
    for window in run:
        assert 1 <= len(window) <= accumulation
        for batch in window:
            assert len(batch.input_ids) <= micro_batch
            rows = rows_in(batch)
            seen.update(rows)
            assert batch.tokens == sum(len(ids) for ids, _ in rows)
            assert batch.targets == sum(count for _, count in rows)
            assert batch.padded_right
    assert seen == rows_of(train)
    evaluated: Counter[tuple[Any, ...]] = Counter()
    for batch in batches(train, micro_batch=micro_batch):
        evaluated.update(rows_in(batch))
    assert evaluated == seen


def test_the_count_notices_a_row_or_target_lost_or_invented(load: Any) -> None:
    train = load([5, 9, 13], eval_fraction=0.0).train
    window = next(iter(windows(train, TrainConfig(micro_batch=1, accumulation=3))))
    learned, silent = (window[0].labels.clone() for _ in range(2))
    learned[0, 1], silent[0, -1] = window[0].input_ids[0, 1], IGNORED  # the prompt is learned, the answer's end is not
    for mistaken, sound in (
        (window, True),
        (window[1:], False),
        ([*window, window[0]], False),
        ([replace(window[0], labels=learned), *window[1:]], False),
        ([replace(window[0], labels=silent), *window[1:]], False),
    ):
        assert (Counter(row for batch in mistaken for row in rows_in(batch)) == rows_of(train)) == sound


@given(lengths=LENGTHS, seed=st.integers(0, 50), packing=st.booleans(), start=st.integers(0, 12), data=st.data())
@FEW
def test_the_order_is_the_seeds_and_resumes_anywhere(
    load: Any, lengths: list[int], seed: int, packing: bool, start: int, data: st.DataObject
) -> None:
    train = load(lengths, packing=packing, eval_fraction=0.0).train
    config = TrainConfig(micro_batch=2, accumulation=3, seed=seed, max_steps=12)
    straight = [[rows_in(batch) for batch in window] for window in windows(train, config)]
    again = load(lengths, packing=packing, eval_fraction=0.0).train
    resumed = [[rows_in(batch) for batch in window] for window in windows(again, config, start_step=start)]
    assert resumed == straight[start:]
    # The same window split another way holds the same rows, in the same order.
    other = TrainConfig(micro_batch=data.draw(st.sampled_from([1, 6])), accumulation=1, seed=seed, max_steps=12)
    other = TrainConfig(micro_batch=other.micro_batch, accumulation=6 // other.micro_batch, seed=seed, max_steps=12)
    for step in range(12):
        assert (window_sequences(train, config, step) == window_sequences(train, other, step)).all()


def test_another_seed_and_another_epoch_are_another_order(load: Any) -> None:
    train = load(list(range(1, 31)), eval_fraction=0.0).train
    config = TrainConfig(micro_batch=2, accumulation=3)
    per_epoch = windows_per_epoch(train, config)
    first = [set(window_sequences(train, config, step).tolist()) for step in range(per_epoch)]
    second = [set(window_sequences(train, config, per_epoch + step).tolist()) for step in range(per_epoch)]
    reseeded = [
        set(window_sequences(train, TrainConfig(micro_batch=2, accumulation=3, seed=1), s).tolist())
        for s in range(per_epoch)
    ]
    assert first != second
    assert first != reseeded
    assert set().union(*first) == set().union(*second) == set(range(30))


@given(lengths=LENGTHS, packing=st.booleans(), micro_batch=st.integers(1, 4), seed=st.integers(0, 20))
@FEW
def test_no_micro_batch_is_dearer_than_the_smoke_steps(
    load: Any, lengths: list[int], packing: bool, micro_batch: int, seed: int
) -> None:
    train = load(lengths, packing=packing, eval_fraction=0.0).train
    config = TrainConfig(micro_batch=micro_batch, accumulation=2, seed=seed, max_steps=20)
    smoke = longest_window(train, config)
    assert len(smoke) == 2
    for window in windows(train, config):
        for batch in window:
            assert batch.input_ids.numel() <= smoke[0].input_ids.numel()
            assert batch.tokens <= smoke[0].tokens


def held_to_hold_every_row_once(rows: list[list[int]], sizes: Any, room: int) -> None:
    assert sorted(row for sequence in rows for row in sequence) == list(range(len(sizes)))
    assert all(0 < sizes[sequence].sum() <= room for sequence in rows)


@pytest.mark.parametrize("rows", [[[0, 1]], [[0, 1], [2, 1]], [[0, 1, 2]], [[0, 1], [2], []]], ids=str)
def test_the_check_rejects_rows_lost_repeated_or_too_many(rows: list[list[int]]) -> None:
    held_to_hold_every_row_once([[0, 1], [2]], np.array([4, 6, 5]), 10)
    with pytest.raises(AssertionError):
        held_to_hold_every_row_once(rows, np.array([4, 6, 5]), 10)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=300), room=st.integers(50, 200), seed=st.integers(0, 20)
)
@settings(max_examples=settings.default.max_examples)
def test_packing_puts_every_row_in_one_sequence_that_holds_it(lengths: list[int], room: int, seed: int) -> None:
    sizes = np.array(lengths, dtype=np.int32)
    packed = pack(sizes, room, seed=seed)
    rows = [packed[s].tolist() for s in range(len(packed))]
    held_to_hold_every_row_once(rows, sizes, room)
    # First fit: were two sequences at most half full, the later one's rows would have gone into the earlier.
    if len(packed) <= 64:
        assert sum(2 * sizes[sequence].sum() <= room for sequence in rows) <= 1
    again = pack(sizes, room, seed=seed)
    assert (again.rows == packed.rows).all()
    assert (again.starts == packed.starts).all()


@pytest.mark.parametrize(
    ("lengths", "room", "sequences"),
    [
        ([50, 50], 100, 1),  # an exact fit
        ([50, 51], 100, 2),
        ([60] * 200, 100, 200),  # more sequences than are kept open at one time
        ([60, 40] * 100, 100, 100),
    ],
)
def test_packing_of_known_rows(lengths: list[int], room: int, sequences: int) -> None:
    packed = pack(np.array(lengths, dtype=np.int32), room, seed=0)
    assert sorted(packed.rows.tolist()) == list(range(len(lengths)))
    assert sequences <= len(packed) <= sequences * 1.35


@given(epochs=st.floats(0.05, 3.5), lengths=LENGTHS)
@FEW
def test_steps_are_those_of_the_epochs_rounded_up(load: Any, epochs: float, lengths: list[int]) -> None:
    train = load(lengths, eval_fraction=0.0).train
    config = TrainConfig(micro_batch=2, accumulation=2, epochs=epochs)
    per_epoch = windows_per_epoch(train, config)
    assert total_steps(train, config) - 1 < epochs * per_epoch <= total_steps(train, config) + 1e-6
    assert total_steps(train, TrainConfig(max_steps=7, epochs=epochs)) == 7


def test_the_fingerprint_is_of_the_tokens_and_of_the_split(load: Any) -> None:
    lengths = list(range(5, 25))
    split = load(lengths)
    assert load(lengths).train.fingerprint == split.train.fingerprint
    assert load([*lengths[:-1], 3]).train.fingerprint != split.train.fingerprint
    assert load(lengths, seed=3).train.fingerprint != split.train.fingerprint
    assert split.held_out.fingerprint != split.train.fingerprint


# Files: which place, what is wrong, what it begins with; or counted and listed.


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


GOOD = '{"prompt": "a", "completion": "b"}'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("name", "text", "place", "said"),
    [
        ("a.jsonl", f'{GOOD}\n\n{{"prompt": "a"\n{GOOD}\n', ":3", "not JSON"),
        ("a.jsonl", f'{GOOD}\n{{"prompt": "a"}}\n', ":2", "its columns are prompt"),
        ("a.json", f"[{GOOD}, 3]", ":row 2", "the row is a number, not a mapping"),
        ("a.csv", 'prompt,completion\na,"b\nc"\nd,\n', ":4", "completion is empty"),
        ("a.csv", "prompt,completion\na,b\nd\n", ":3", "the header has"),
        ("a.csv", "prompt,completion\na,b,c\n", ":2", "the header has"),
    ],
)
def test_a_bad_row_stops_with_its_place_or_is_listed(
    tmp_path: Path, cache: Path, name: str, text: str, place: str, said: str
) -> None:
    data = write(tmp_path / name, text)
    with pytest.raises(DataError, match=rf"(?s){name}{place}: .*{said}.*The row begins: .*--skip-bad-rows"):
        load_examples(DataConfig(data=data), tiny_tokenizer(), seed=0)
    assert not list(cache.rglob("*.arrow")), "a run that was refused left a token file behind"
    if "b,c" in text:
        return
    split = load_examples(DataConfig(data=data, skip_bad_rows=True), tiny_tokenizer(), seed=0)
    assert split.stats.train.bad == 1
    assert f"{name}{place}: " in str(split.stats)


def test_parquet_rows_are_numbered(tmp_path: Path, cache: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet:row 2: its columns are prompt, completion"):
        load_examples(DataConfig(data=str(tmp_path / "a.parquet")), tiny_tokenizer(), seed=0)
    broken = write(tmp_path / "b.parquet", "no parquet")
    with pytest.raises(DataError, match="no Parquet file"):
        load_examples(DataConfig(data=broken), tiny_tokenizer(), seed=0)


def test_files_that_cannot_be_read_are_named(tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "rows.jsonl", GOOD)
    with pytest.raises(DataError, match=r"no such file; did you mean rows\.jsonl\?"):
        load_examples(DataConfig(data=str(tmp_path / "row.jsonl")), tiny_tokenizer(), seed=0)
    with pytest.raises(DataError, match=r"files ending in '\.txt' are not read; use one of \.jsonl"):
        load_examples(DataConfig(data=write(tmp_path / "rows.txt", "a")), tiny_tokenizer(), seed=0)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        load_examples(DataConfig(data=str(tmp_path / "latin.jsonl")), tiny_tokenizer(), seed=0)
    with pytest.raises(DataError, match="no row to train on"):
        load_examples(DataConfig(data=write(tmp_path / "empty.jsonl", "")), tiny_tokenizer(), seed=0)


def test_a_changed_file_is_read_anew_and_an_unchanged_one_is_not(tmp_path: Path, cache: Path) -> None:
    data = write(tmp_path / "rows.jsonl", GOOD + "\n")
    first = load_examples(DataConfig(data=data), tiny_tokenizer(), seed=0)
    load_examples(DataConfig(data=data), tiny_tokenizer(), seed=0)
    assert len(list(cache.rglob("*.arrow"))) == 1
    write(tmp_path / "rows.jsonl", GOOD.replace("b", "c") + "\n")
    second = load_examples(DataConfig(data=data), tiny_tokenizer(), seed=0)
    assert first.train.fingerprint != second.train.fingerprint
    assert len(list(cache.rglob("*.arrow"))) == 2


def test_a_change_in_the_middle_of_a_large_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    path.write_bytes(b"a" * (3 << 20))
    before = source_fingerprint(str(path))
    assert source_fingerprint(str(path)) == before
    os.utime(path, ns=(0, 1))
    assert source_fingerprint(str(path)) != before


def test_the_fingerprint_is_of_what_is_learned_too(tmp_path: Path, cache: Path) -> None:
    data = write(tmp_path / "rows.jsonl", GOOD + "\n")
    answers, everything = (
        load_examples(DataConfig(data=data, train_on_prompt=choice), tiny_tokenizer(), seed=0).train
        for choice in (False, True)
    )
    assert answers.fingerprint != everything.fingerprint


def test_held_out_rows_of_another_file_leave_all_rows_to_train_on(tmp_path: Path, cache: Path) -> None:
    train = write(tmp_path / "train.jsonl", (GOOD + "\n") * 3)
    other = write(tmp_path / "eval.jsonl", GOOD.replace("b", "c") + "\n")
    split = load_examples(DataConfig(data=train, eval_data=other), tiny_tokenizer(), seed=0)
    assert (len(split.train), len(split.held_out)) == (3, 1)
    assert split.held_out[0].source.endswith("eval.jsonl:1")


def test_what_was_cut_is_told(tmp_path: Path, cache: Path) -> None:
    rows = [GOOD, GOOD.replace('"b"', f'"{"b" * 50}"'), GOOD.replace('"a"', f'"{"a" * 200}"')]
    split = load_examples(
        DataConfig(data=write(tmp_path / "rows.jsonl", "\n".join(rows)), seq=40), tiny_tokenizer(), seed=0
    )
    counts = split.stats.train
    assert (counts.rows, counts.truncated, counts.without_target) == (3, 2, 1)
    assert "2 rows cut to --seq" in str(split.stats)
    assert "1 rows left out: nothing to learn" in str(split.stats)
