"""The embedded data: which functions of a library become rows, and what is in them."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import pytest

from finetune.config.settings import DEMO, DEMO_QUESTION, EMBEDDED_DATA
from finetune.data.docstrings import CODE_CHARACTERS, PROMPT, docstring_rows
from finetune.data.rows import read_rows, source_fingerprint
from finetune.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

LIBRARY = {
    "b.py": '''
class Box:
    async def size(self):
        """Return the size  of
        the box.

        More of it.
        """
        # a comment
        return self.n


def lower():
    """return the size of the box."""
    return 1


def unfinished():
    """Return the size of the box"""
    return 1


def short():
    """Return it."""
    return 1


def long():
    """Return {words}."""
    return 1


def large():
    """Return the size of the box."""
    return "{words}"


def empty():
    """Return the size of the box."""
'''.replace("{words}", "word " * 80 + "end"),
    "sub/again.py": 'async def size(self):\n    """Return the size of this box."""\n    return self.n\n',
    "a.py": 'def first():\n    """Return the number of the first."""\n    return "\\d"\n',
    "old.py": 'print "hello"\n',
    "null.py": "\0",
    "test/test_a.py": 'def check():\n    """Return the size of the test."""\n    return 1\n',
    "notes.txt": "",
}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name, text in LIBRARY.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_functions_with_a_sentence_become_rows_in_the_order_of_the_files(library: Path) -> None:
    first = PROMPT.format(code="def first():\n    return '\\\\d'")
    size = PROMPT.format(code="async def size(self):\n    return self.n")
    assert list(docstring_rows(library)) == [
        ("a.py:1", {"prompt": first, "completion": "Return the number of the first."}),
        ("b.py:3", {"prompt": size, "completion": "Return the size of the box."}),
    ]


def test_a_library_without_sources_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no source files with docstrings") as error:
        list(docstring_rows(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_this_python_has_a_thousand_rows_and_none_knows_the_demos_question() -> None:
    rows = list(read_rows(EMBEDDED_DATA))
    assert len(rows) > 1000
    assert len({row.source for row in rows}) == len(rows)
    before = PROMPT.partition("{code}")[0]
    assert all(row.fields["prompt"].startswith(before) for row in rows)
    assert all(len(row.fields["prompt"]) <= len(before) + CODE_CHARACTERS for row in rows)
    assert source_fingerprint(EMBEDDED_DATA) == source_fingerprint(EMBEDDED_DATA)

    assert DEMO.output.question == DEMO_QUESTION
    code = DEMO_QUESTION.removeprefix(before)
    assert ast.unparse(ast.parse(code)) == code  # it is written as the rows are
    assert not any("celsius" in f"{row.fields['prompt']} {row.fields['completion']}".lower() for row in rows)
