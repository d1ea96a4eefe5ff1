"""The rows of a dry run are as many and as long as asked for, with tokens that the model has."""

from __future__ import annotations

from finetune.config.settings import TrainConfig
from finetune.data.batches import longest_window
from finetune.dryrun.full_rows import FullRows


def test_a_window_of_full_rows() -> None:
    rows = FullRows(count=6, tokens=40, vocabulary=100)
    window = longest_window(rows, TrainConfig(micro_batch=3, accumulation=2))
    assert [tuple(batch.input_ids.shape) for batch in window] == [(3, 40), (3, 40)]
    assert int(window[0].input_ids.max()) == 99
    assert window[0].targets == 3 * 39  # every token but the first of a row
    assert rows.sequence_lengths().tolist() == [40] * 6


def test_packed_rows_share_a_sequence() -> None:
    batch = FullRows(count=6, tokens=41, vocabulary=100, packed=2).batch([0, 1, 2])
    assert batch.row_lengths == (21, 20) * 3
    assert batch.input_ids.shape == (3, 41)
    assert batch.targets == 3 * (20 + 19)
    assert FullRows(count=1, tokens=1, vocabulary=100, packed=2).batch([0]).row_lengths is None
