"""Replace the data sets that a process loads with the library ``datasets``: by a file, or by their longest rows.

This is the only patch of ``datasets``. It was tried with versions 4.0 to 5.2. It may go when the library can load a
hub's data set from a prepared cache without network, and has a hook for the rows that it returns.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from pytest_vram.drygpu.process.variables import DATA_VARIABLE, RECORD_VARIABLE, ROWS_FILE, ROWS_VARIABLE
from pytest_vram.standins.rows import MOST_ROWS, longest

if TYPE_CHECKING:
    from collections.abc import Callable

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""The builder of ``datasets`` that reads a file, by the file's suffix."""

_SPLITS = ("train", "validation", "test")
_SPLIT_NAME = re.compile(r"(^|\+)([\w.-]+)")


def install() -> None:
    """Replace data sets from now on in this process, as the environment says. ``datasets`` must be imported."""
    import datasets

    replaced: dict[str, str] = json.loads(os.environ.get(DATA_VARIABLE) or "{}")
    words = int(os.environ.get(ROWS_VARIABLE) or 0)
    stand_ins: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
    if replaced:
        builder = _with_files(datasets.load.load_dataset_builder, replaced, stand_ins)
        datasets.load.load_dataset_builder = datasets.load_dataset_builder = builder
    for name in ("as_dataset", "as_streaming_dataset"):
        original = getattr(datasets.DatasetBuilder, name)
        setattr(datasets.DatasetBuilder, name, _with_longest_rows(original, words, stand_ins))


def _with_files(
    original: Callable[..., Any], replaced: dict[str, str], stand_ins: WeakKeyDictionary[Any, str]
) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_dataset_builder(path: str, *args: Any, **kwargs: Any) -> Any:
        if path not in replaced:
            return original(path, *args, **kwargs)
        file = Path(replaced[path])
        kept = {name: kwargs[name] for name in ("cache_dir", "download_mode") if name in kwargs}
        builder = original(BUILDERS[file.suffix], data_files=dict.fromkeys(_SPLITS, str(file)), **kept)
        stand_ins[builder] = path
        return builder

    return load_dataset_builder


def _with_longest_rows(
    original: Callable[..., Any], words: int, stand_ins: WeakKeyDictionary[Any, str]
) -> Callable[..., Any]:
    @functools.wraps(original)
    def as_dataset(self: Any, split: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self in stand_ins and split is not None:
            # The file is the same for every split, and the hub's data set may have others than these three.
            split = _SPLIT_NAME.sub(lambda found: found[1] + (found[2] if found[2] in _SPLITS else "train"), str(split))
        found = original(self, split, *args, **kwargs)
        if not words:
            return found
        name = stand_ins.get(self) or self.repo_id or Path(self.dataset_name or "data").name
        return _replaced(found, words, name)

    return as_dataset


def _replaced(data: Any, words: int, name: str) -> Any:
    """Return a data set, or a dictionary of its splits, with rows of ``words`` words."""
    import datasets

    if isinstance(data, dict):
        return type(data)({split: _replaced(part, words, name) for split, part in data.items()})
    if isinstance(data, list):
        return [_replaced(part, words, name) for part in data]
    if not isinstance(data, datasets.Dataset):
        columns: dict[str, None] = {}

        def lengthened(row: dict[str, Any]) -> dict[str, Any]:
            row, column = longest(row, words)
            if column not in columns:
                columns[column] = None
                _tell(name, column)
            return row

        return data.map(lengthened)
    if not len(data):
        return data
    _tell(name, longest(data[0], words)[1])
    # The rows keep their own prompts, because programs may drop a row that they have seen.
    rows = [longest(data[number % len(data)], words)[0] for number in range(MOST_ROWS)]
    return datasets.Dataset.from_list(rows, features=data.features, split=data.split)


def _tell(name: str, column: str) -> None:
    """Write for the report of the run which data set was replaced, and which of its columns were lengthened."""
    folder = os.environ.get(RECORD_VARIABLE)
    if folder:
        with Path(folder, ROWS_FILE).open("a") as file:
            file.write(f"{name}: {column or 'nothing'}\n")
