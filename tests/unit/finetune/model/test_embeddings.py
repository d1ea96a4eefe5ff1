"""Which tokens and positions are within a model's tables, to the last row."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from finetune.config.settings import RunConfig
from finetune.errors import DataError
from finetune.model import embeddings
from finetune.model.embeddings import Tables, check_tables, tables_of


class Model(nn.Module):
    def __init__(self, head: nn.Module | None) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), head
        self.config = SimpleNamespace(model_type="llama")
        self.config.get_text_config = lambda: self.config

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head


@pytest.mark.parametrize(("head", "tokens"), [(None, 9), (nn.Linear(4, 7), 7), (nn.Linear(4, 12), 9)])
def test_a_token_needs_a_row_of_the_embeddings_and_of_the_head(head: nn.Module | None, tokens: int) -> None:
    model: Any = Model(head)
    assert tables_of(model) == Tables(tokens=tokens, positions=None)


@pytest.mark.parametrize(
    ("largest_id", "longest", "refused"),
    [(8, 32, ""), (9, 32, "token"), (8, 33, "position")],
)
def test_the_last_row_of_each_table_is_the_last_that_can_be_used(
    monkeypatch: pytest.MonkeyPatch, largest_id: int, longest: int, refused: str
) -> None:
    monkeypatch.setattr(embeddings, "_unknown_token", lambda *_: "token")
    monkeypatch.setattr(embeddings, "_too_long", lambda *_: "position")
    counts = SimpleNamespace(largest_id=largest_id, longest=longest)
    data: Any = SimpleNamespace(train=SimpleNamespace(rows=None), stats=SimpleNamespace(train=counts, held_out=None))
    said = ""
    try:
        check_tables(Tables(tokens=9, positions=32), data, None, RunConfig())
    except DataError as error:
        said = str(error)
    assert said == refused
