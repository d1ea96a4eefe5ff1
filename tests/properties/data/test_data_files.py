"""Data files as other programs write them: other delimiters, encodings and layouts are read, or named with a remedy."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

import pytest
from tiny_tokenizers import tiny_tokenizer

from finetune.config.settings import DataConfig
from finetune.data.encode import encode
from finetune.data.rows import BadRowError, Row, read_rows
from finetune.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

AB = {"prompt": "a", "completion": "b"}
GOOD = json.dumps(AB)
PRETTY = json.dumps(AB, indent=2)


def read(path: Path, content: str | bytes) -> list[tuple[Any, str | None]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(row.fields, row.problem) for row in read_rows(str(path))]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_csv_file_is_cut_at_the_delimiter_of_its_header(tmp_path: Path, delimiter: str, end: str, mark: str) -> None:
    text = '"x, y; z | w\nnext"'
    lines = [delimiter.join(cells) for cells in (("", "prompt", "completion"), ("0", "hi", text), ("1", "a", "b"))]
    found = read(tmp_path / "a.csv", mark + end.join(lines) + end)
    assert found == [({"prompt": "hi", "completion": "x, y; z | w\nnext"}, None), (AB, None)]


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("prompt;completion\na;b\n", AB),  # a decoy in the values: the header alone decides
        ("prompt;completion\na, c;b, d\n", {"prompt": "a, c", "completion": "b, d"}),
        ("text\n a;b\n", {"text": " a;b"}),
        ("sep=;\nprompt;completion\na;b\n", AB),  # Excel
        ("\n\nSEP=^\r\nprompt^completion\r\na^b\r\n", AB),
        ("sep=,\nprompt,completion\na,b\n", AB),
        ('prompt, completion\n"a", "b"\n', AB),
        ("prompt, completion\na, b\n", AB),
        ("prompt,completion\n a, b\n", {"prompt": " a", "completion": " b"}),
        ("question;answer\na;b\n", {"question": "a", "answer": "b"}),  # named, so that the error is true
    ],
)
def test_how_a_csv_file_is_written_is_read_from_its_header(tmp_path: Path, text: str, columns: dict[str, str]) -> None:
    assert read(tmp_path / "a.csv", text) == [(columns, None)]
    assert read(tmp_path / "a.TSV", text) == [(columns, None)]


@pytest.mark.parametrize(
    ("text", "line", "said", "good"),
    [
        ('prompt,completion\n"say \\"x\\" now",b\na,b\n', 2, "inside quotation marks, write a quotation mark twice", 1),
        ('prompt,completion\na,b\n"a,b\na,b\n', 3, "unexpected end of data (the row covers lines 3 to 4)", 1),
        ('prompt,completion\n"a,b\na,b\n"c",d\na,b\n', 2, "(the row covers lines 2 to 4)", 1),
        ('sep=;\n\nprompt;completion\n"a\nb"\na;b\n', 4, "(the row covers lines 4 to 5)", 1),
    ],
)
def test_quotation_marks_that_do_not_match_are_a_bad_row_with_its_lines(
    tmp_path: Path, text: str, line: int, said: str, good: int
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    rows = list(read_rows(str(path)))
    bad = [row for row in rows if row.problem]
    assert len(bad) == 1
    assert bad[0].source.endswith(f"a.csv:{line}")
    assert said in (bad[0].problem or "")
    assert bad[0].beginning() not in ("", "{}")
    assert [row.fields for row in rows if not row.problem] == [AB] * good


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.JSONL"])
@pytest.mark.parametrize(
    "text",
    [
        f"[{GOOD}, {GOOD}]",
        f"\ufeff\n[{GOOD},\n{GOOD}]\n\n",
        f"[\n{PRETTY},\n{PRETTY}\n]",
        f"{GOOD}\n{GOOD}",
        f"{GOOD}\r\n\r\n{GOOD}\r\n",
        f"{GOOD}\n\ufeff{GOOD}\n",  # two files with the mark of UTF-8, joined
    ],
)
def test_a_json_list_and_json_lines_are_told_by_their_content(tmp_path: Path, name: str, text: str) -> None:
    assert read(tmp_path / name, text) == [(AB, None)] * 2


def test_a_first_line_that_is_broken_leaves_the_others(tmp_path: Path) -> None:
    for broken in ('{"prompt": "a", "compl', "[1, 2", "oops", "[1, 2]", f"{GOOD},"):
        first, second = read(tmp_path / "a.jsonl", f"{broken}\n{GOOD}\n")
        assert second == (AB, None)
        assert first[0] == [1, 2] or "not JSON: " in (first[1] or "")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", PRETTY, "an object that covers several lines; write each row on one line"),
        ("a.jsonl", f"{PRETTY}\n{PRETTY}\n", "an object that covers several lines; write each row on one line"),
        ("a.json", json.dumps({"data": [AB]}), "with a list 'data' in it"),
        ("a.json", json.dumps({"prompt": ["a", "b"], "completion": ["c", "d"]}), "holds columns and not rows"),
        ("a.json", json.dumps({"prompt": {"0": "a"}, "completion": {"0": "c"}}), "orient='records', lines=True"),
        ("a.jsonl", "prompt;completion\na;b\n", "let its name end in .csv"),
        ("a.csv", f"{GOOD}\n", "begins with { as JSON does; let its name end in .jsonl"),
        ("a.jsonl", gzip.compress(GOOD.encode()), "compressed with gzip; unpack it"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode()), "files ending in '.gz' are not read; use one of .jsonl, "),
        ("a.jsonl.gz", gzip.compress(GOOD.encode()), "compressed with gzip; unpack it"),
        ("a.csv", b"PK\x03\x04....", "a zip archive or a spreadsheet"),
        ("a.csv", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.parquet", b"", "the file is empty"),
        ("a.parquet", GOOD, "no Parquet file, whatever its name says"),
        ("a.parquet", b"PAR1 and nothing more", "not a sound Parquet file (after row 0)"),
        ("a.jsonl", b"PAR1....", "let its name end in .parquet"),
        ("a.json", "<!DOCTYPE html>\n", "a web page"),
        ("a.jsonl", GOOD.encode("utf-16"), "text in UTF-16; convert it, for example with iconv -f UTF-16 "),
        ("a.csv", "prompt,completion\n".encode("utf-16-le"), "iconv -f UTF-16LE "),
        ("a.csv", "prompt,completion\n".encode("utf-16-be"), "iconv -f UTF-16BE "),
        ("a.jsonl", GOOD.encode("utf-32"), "text in UTF-32"),
        ("a.jsonl", b"\0\1\2", "binary and not text"),
        ("a.csv", "prompt,completion\na,b\ncaf\xe9,b\n".encode("latin-1"), "byte 4 of line 3 is not UTF-8"),
        ("a.jsonl", f"{GOOD}\n".encode() * 9000 + b"\xff\n", "byte 1 of line 9001 is not UTF-8"),
    ],
)
def test_a_file_that_holds_something_else_is_named_with_a_remedy(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path / name, content)
    assert said in str(caught.value)
    assert name in str(caught.value)


def test_a_damaged_page_of_parquet_is_named_with_the_rows_before_it(tmp_path: Path) -> None:
    import pandas as pd

    path = tmp_path / "a.parquet"
    pd.DataFrame({"prompt": ["a"] * 9, "completion": [f"text {i}" for i in range(9)]}).to_parquet(path)
    whole = path.read_bytes()
    with pytest.raises(DataError, match=r"not a sound Parquet file \(after row 0\)"):
        read(path, whole[:20] + b"\xff" * 60 + whole[80:])


def test_a_folder_and_a_dangling_link_are_no_files_that_one_meant(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(DataError, match="this is a folder; give a file in it"):
        read_rows(str(tmp_path / "rows.jsonl"))
    (tmp_path / "lines.csv").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"there is no such file$"):
        read_rows(str(tmp_path / "lines.csv"))


NO_TEXT = {
    "null": (None, "completion (which holds nothing)"),
    "NaN": (float("nan"), "completion (which holds nothing)"),
    "a number": (4, "completion is a number, not text; write it as text"),
    "a fraction": (0.5, "completion is a number, not text"),
    "a truth value": (True, "completion is true or false, not text"),
    "bytes": (b"b", "completion is bytes, not text"),
    "a mapping": ({"a": 1}, "completion is a mapping, not messages"),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_a_value_that_is_no_text_is_named_in_words(name: str) -> None:
    value, said = NO_TEXT[name]
    fields = {"prompt": [{"role": "user", "content": "a"}] if name == "a mapping" else "a", "completion": value}
    with pytest.raises(BadRowError) as caught:
        encode(Row(source="a:1", fields=fields), tiny_tokenizer(), DataConfig(seq=64))
    assert said in str(caught.value)


@pytest.mark.parametrize("nothing", [None, [], "", float("nan")])
def test_a_column_of_another_format_that_holds_nothing_does_not_decide(nothing: Any) -> None:
    tokenizer, config = tiny_tokenizer(), DataConfig(seq=64)
    alone = encode(Row(source="a:1", fields=AB), tokenizer, config)
    beside = encode(Row(source="a:1", fields={"messages": nothing, "text": nothing} | AB), tokenizer, config)
    assert beside.input_ids.tolist() == alone.input_ids.tolist()


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image"}, "a part that is not text: {'type': 'image'}"),
        ({"type": "text", "content": "a"}, "given as text or as {'type': 'text', 'text': ...}"),
        (None, "a part that is not text: None"),
        (3, "a part that is not text: 3"),
    ],
)
def test_a_part_of_a_content_that_is_not_text_is_shown(part: Any, said: str) -> None:
    messages = [{"role": "user", "content": ["a", part]}, {"role": "assistant", "content": "b"}]
    with pytest.raises(BadRowError) as caught:
        encode(Row(source="a:1", fields={"messages": messages}), tiny_tokenizer(), DataConfig(seq=64))
    assert said in str(caught.value)


def test_parts_of_a_content_may_be_texts() -> None:
    answer = {"role": "assistant", "content": "b"}
    as_parts = [{"role": "user", "content": ["a", {"type": "text", "text": "c"}]}, answer]
    as_text = [{"role": "user", "content": "ac"}, answer]
    found = [
        encode(Row(source="a:1", fields={"messages": messages}), tiny_tokenizer(), DataConfig(seq=64))
        for messages in (as_parts, as_text)
    ]
    assert found[0].input_ids.tolist() == found[1].input_ids.tolist()


@pytest.mark.parametrize(("role", "meant"), [("User", "user"), ("GPT", "assistant"), ("model", "assistant")])
def test_a_role_under_another_name_is_guessed(role: str, meant: str) -> None:
    with pytest.raises(BadRowError, match=rf"has the role '{role}' \(did you mean {meant}\?\)"):
        encode(
            Row(source="a:1", fields={"messages": [{"role": role, "content": "a"}]}),
            tiny_tokenizer(),
            DataConfig(seq=64),
        )
