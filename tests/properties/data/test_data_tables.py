"""CSV columns without a name, what a run says of its rows, and sources that leave nothing to train on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import tiny_tokenizer

from finetune.config.settings import DataConfig
from finetune.data.batches import load_examples
from finetune.data.rows import read_rows
from finetune.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

GOOD = '{"prompt": "a", "completion": "b"}'
CELLS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12).map(lambda s: f"a{s}")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


def write(path: Path, text: str, **how: Any) -> str:
    path.write_text(text, **how)
    return str(path)


def rows_of(path: Path, text: str, **how: Any) -> list[tuple[Any, str | None]]:
    return [(row.fields, row.problem) for row in read_rows(write(path, text, **how))]


def load(data: str, **changes: Any) -> Any:
    return load_examples(DataConfig(**{"data": data, "eval_fraction": 0.0} | changes), tiny_tokenizer(), seed=0)


@pytest.mark.parametrize(
    "text",
    [
        ",prompt,completion\n0,a,b\n1,a,b\n",  # pandas' index
        ",,prompt,completion\n0,10,a,b\n-1,1.5,a,b\n",  # an index of two levels
        "prompt,completion,\na,b,\na,b,\n",  # a comma at the end of each line
        "prompt,completion,,\na,b,,\na,b, ,\n",
        "prompt,completion,\na,b\na,b\n",  # of the header alone
        "prompt,completion\na,b,\na,b,,\n",  # of the rows alone
        ' ,"prompt","completion"\n0,a,b\n1,a,b\n',
        "prompt , completion\na,b\na,b\n",
        "prompt,completion,completion\na,b,b\na,,b\n",
        "prompt,completion\r\na,b\r\n\r\na,b\r\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_columns_without_a_name_that_hold_nothing_or_numbers_are_left_out(
    tmp_path: Path, text: str, encoding: str
) -> None:
    found = rows_of(tmp_path / "a.csv", text, encoding=encoding, newline="")
    assert found == [({"prompt": "a", "completion": "b"}, None)] * 2


@given(cells=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
@settings(max_examples=settings.default.max_examples // 2)
def test_what_pandas_writes_is_read_with_its_index_and_without(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]]
) -> None:
    import pandas as pd

    path = tmp_path_factory.mktemp("csv") / "a.csv"
    frame = pd.DataFrame(cells, columns=["prompt", "completion"])
    for index in (True, False):
        frame.to_csv(path, index=index)
        read = [(row.fields, row.problem) for row in read_rows(str(path))]
        assert read == [({"prompt": one, "completion": two}, None) for one, two in cells]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (",prompt,completion\n0,a,b\nnote,a,b\n", 3, "column 1 has no name in the header and holds 'note'"),
        ("prompt,completion,\na,b,\na,b,c\n", 3, "column 3 has no name in the header and holds 'c'"),
        ("prompt,completion\na,b,\na,b,c\n", 3, "it has 3 columns, and the header has 2"),
        ("prompt,completion,score,\na,b,1,\na\n", 3, "it has 1 column, and the header has 4"),
        ("prompt,completion,completion\na,b,b\na,b,c\n", 3, "the header names two columns 'completion'"),
        ('prompt,completion\n"a\nb",c\na,b,c\n', 4, "it has 3 columns, and the header has 2"),
    ],
)
def test_what_else_is_wrong_with_a_csv_row_is_said_truly(tmp_path: Path, text: str, line: int, said: str) -> None:
    data = write(tmp_path / "a.csv", text)
    with pytest.raises(DataError) as caught:
        load(data)
    assert f"a.csv:{line}: {said}" in str(caught.value)
    assert load(data, skip_bad_rows=True).stats.train.bad == 1


def test_rows_that_a_template_or_tokenizer_refuses_have_their_line_and_are_skipped(tmp_path: Path) -> None:
    bad = [{"prompt": "hi", "completion": "cut \ud83d"}, {"messages": [{"role": "user", "content": "\udc00"}] * 2}]
    deep = '{"prompt": ' + "[" * 200_000
    data = write(tmp_path / "a.jsonl", "\n".join([GOOD, *(json.dumps(row) for row in bad), deep, GOOD]) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: its text holds half of a character") as caught:
        load(data)
    str(caught.value).encode()
    split = load(data, skip_bad_rows=True)
    assert (split.stats.train.bad, len(split.train)) == (3, 2)
    told = str(split.stats)
    told.encode()
    assert all(f"a.jsonl:{line}: " in told for line in (2, 3, 4))


def test_columns_that_no_prompt_holds_are_named_once_with_their_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"} | ({"score": i} if i % 2 else {}) | {"id": f"{i}"} for i in range(6)]
    data = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # read, and from the cache
        told = str(load(data).stats)
        assert told.count("--data: rows have a column 'score' that the prompt leaves out (3 of 6 rows)") == 1
        assert told.count("--data: rows have a column 'id' that the prompt leaves out (6 of 6 rows)") == 1
    many = write(tmp_path / "b.jsonl", json.dumps(rows[0] | {f"c{i}": i for i in range(30)}) + "\n")
    assert "--data: ... and 21 more columns and keys" in str(load(many).stats)


@pytest.mark.parametrize(
    ("text", "settings", "said"),
    [
        ("", {}, "no row to train on; it holds no rows"),
        ("{}\n{}\n", {"skip_bad_rows": True}, "of 2 rows, 2 cannot be used (the first is "),
        (GOOD, {"seq": 4}, "of 1 row, 1 has nothing to learn within --seq tokens (raise --seq"),
        (f"{{}}\n{GOOD}", {"seq": 4, "skip_bad_rows": True}, "1 cannot be used"),
    ],
)
def test_why_no_row_is_left_is_said_in_a_sentence(
    tmp_path: Path, text: str, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "a.jsonl", text), **settings)
    assert said in str(caught.value)
    assert "Counts(" not in str(caught.value)


def test_packing_with_nothing_held_out(tmp_path: Path) -> None:
    split = load(write(tmp_path / "a.jsonl", GOOD + "\n"), packing=True)
    assert split.held_out.sequence_lengths().tolist() == []


def test_positions_of_padding_are_those_of_some_row(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b" * size} for size in (1, 40, 40)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    train = load(write(tmp_path / "a.jsonl", text), packing=True, seq=256).train
    short = load(write(tmp_path / "b.jsonl", json.dumps(rows[0])), packing=True, seq=256).train
    lines = [[train[i] for i in range(3)], [short[0]]]
    from finetune.data.batches import collate

    batch = collate(lines, 0, packed=True)
    assert batch.position_ids is not None
    assert batch.position_ids[1].max() < len(short[0].input_ids)
