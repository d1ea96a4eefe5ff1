"""The options of ``run`` that replace what a program asks the hub for: ``--shape``, ``--data``, ``--longest-rows``."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pytest_vram.drygpu.process.variables import DATA_VARIABLE, MODELS_VARIABLE, ROWS_FILE, ROWS_VARIABLE
from pytest_vram.errors import VramUsageError
from pytest_vram.memory.note import Note
from pytest_vram.standins import hub
from pytest_vram.standins.data_sets import BUILDERS
from pytest_vram.standins.model import ModelStandIn, Written, parse_shape

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SOURCE = "stand-ins"
_FALLBACK = 16_384
_FROM_CONFIG = -1

# The settings that limit a row, in the files and flags of the tools that are tried in docs/how-to/other-configs.md.
_LENGTHS = (
    "max_seq_length",
    "max_seq_len",
    "max_length",
    "sequence_len",
    "cutoff_len",
    "block_size",
    "model_max_length",
)
_NAMES = "|".join(name.replace("_", "[_-]") for name in _LENGTHS)
_LENGTH = re.compile(rf"(?:^|[\s.,{{\"'-])(?:{_NAMES})[\"']?\s*[:=\s]\s*[\"']?(\d[\d_]*)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class StandIns:
    """What is replaced in a run.

    Attributes:
        models: the models, and folders, that are replaced.
        data: the file that replaces each data set of the hub, by the data set's name.
        rows: the words of each of the longest rows; 0 if rows stay as they are, -1 for the length that the program's
            configuration names.
    """

    models: tuple[ModelStandIn, ...] = ()
    data: dict[str, Path] = field(default_factory=dict)
    rows: int = 0


@dataclass(slots=True, kw_only=True)
class Prepared:
    """Stand-ins that are in place.

    Attributes:
        variables: the program's variables.
        notes: the notes of the report.
        words: the words of each row that is replaced; 0 if none is.
        length_is_known: whether the program's configuration, or the user, says how long rows are.
    """

    variables: dict[str, str]
    notes: list[Note]
    words: int = 0
    length_is_known: bool = True

    def notes_of(self, records: Path) -> tuple[Note, ...]:
        """Return the notes, with those about the data sets whose rows were replaced, which processes left."""
        if not self.words:
            return tuple(self.notes)
        file = records / ROWS_FILE
        lines = list(dict.fromkeys(file.read_text().splitlines())) if file.exists() else []
        if not lines:
            text = "replaced no data set: the program loads none with the library `datasets`, so its rows are its own"
            return (*self.notes, Note(name="--longest-rows", text=text, source=SOURCE))
        told = "; ".join(f"{line} in each row has {self.words:,} words" for line in lines)
        text = f"{told}; the program cuts or packs them to its own length, unless its settings let it drop them"
        if not self.length_is_known:
            text += "; that many words are a guess, because no flag and no file of the command names a length of rows"
        return (*self.notes, Note(name="rows", text=text, source=SOURCE, figures=not self.length_is_known))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to the parser of ``run``."""
    group = parser.add_argument_group("without network and downloads")
    group.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="when the program asks the hub for the model NAME, it gets the one that config.json at PATH describes: "
        "weights that are all zero, and a tokenizer if PATH is not a folder that has one. PATH may also be a shape "
        "that comes with pytest-vram, such as llama-3.1-8b; NAME alone is enough if it is one. A NAME that begins "
        "with /, . or ~ is a folder that is written for the run and removed after it",
    )
    group.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help=f"when the program loads the hub's data set NAME, it gets the rows of this file ({', '.join(BUILDERS)})",
    )
    group.add_argument(
        "--longest-rows",
        nargs="?",
        type=_count,
        const=_FROM_CONFIG,
        default=0,
        metavar="WORDS",
        help="replace the rows of every data set that the program loads by the longest: the answer in each gets WORDS "
        "words, by default as many as the largest length in the program's flags and configuration files "
        f"({', '.join(_LENGTHS)}), or {_FALLBACK}",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number of words, 1 or more, such as 2048")
    return int(text)


def from_arguments(args: argparse.Namespace) -> StandIns:
    """Return what the parsed options ask for.

    Raises:
        VramUsageError: a name is given twice, or a path cannot be used.
    """
    models = [parse_shape(text) for text in args.shape]
    data = dict(_parse_data(text) for text in args.data)
    for option, names, count in (
        ("--shape", {model.name for model in models}, len(models)),
        ("--data", set(data), len(args.data)),
    ):
        if len(names) < count:
            raise VramUsageError(f"{option} is given twice for one name: {', '.join(sorted(names))}")
    return StandIns(models=tuple(models), data=data, rows=args.longest_rows)


def _parse_data(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    file = Path(path).expanduser()
    if not name or not equals or file.suffix not in BUILDERS:
        raise VramUsageError(f"--data {text!r}: write NAME=FILE, where FILE ends in {', '.join(BUILDERS)}")
    if not file.is_file():
        raise VramUsageError(f"--data {text!r}: there is no file {path!r}; with --longest-rows a single row is enough")
    return name, file.absolute()


@contextmanager
def in_place(stand_ins: StandIns, command: Sequence[str]) -> Iterator[Prepared]:
    """Put the stand-ins in place for a program, and remove them at the end.

    Args:
        stand_ins: what is replaced.
        command: the program with its arguments, in which names of known models and lengths of rows are looked for.

    Raises:
        VramUsageError: a model cannot be made.
    """
    prepared = Prepared(variables={}, notes=[])
    environment = os.environ
    models = list(stand_ins.models)
    if models or stand_ins.data or environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        named = {model.name for model in models}
        found = [name for name in hub.known_names(command, environment) if name not in named]
        models += [ModelStandIn(name=name, source=name) for name in found]
    if stand_ins.rows:
        length = _longest_length(command) if stand_ins.rows == _FROM_CONFIG else stand_ins.rows
        prepared.words, prepared.length_is_known = length or _FALLBACK, length > 0
        prepared.variables[ROWS_VARIABLE] = str(prepared.words)
    with ExitStack() as stack:
        for model in (model for model in models if model.is_folder):
            folder, written = hub.write_folder(model)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            prepared.notes += _notes(model, written, rows_replaced=bool(prepared.words))
        on_hub = [model for model in models if not model.is_folder]
        if on_hub or stand_ins.data:
            cache = Path(stack.enter_context(TemporaryDirectory(prefix="pytest-vram-hub-")))
            variables, made = hub.prepare(cache, on_hub, stand_ins.data, environment)
            prepared.variables |= variables
            prepared.variables[DATA_VARIABLE] = json.dumps({name: str(file) for name, file in stand_ins.data.items()})
            prepared.variables[MODELS_VARIABLE] = json.dumps([model.name for model in on_hub])
            # Where no network is asked, usage statistics would only wait for their time limit.
            prepared.variables["DO_NOT_TRACK"] = "1"
            for model in on_hub:
                prepared.notes += _notes(model, made[model.name], rows_replaced=bool(prepared.words))
        yield prepared


def _notes(model: ModelStandIn, written: Written, *, rows_replaced: bool) -> list[Note]:
    of = "" if model.source == model.name else f", of {model.source}"
    what = "an empty checkpoint" if written.weights else "the files"
    notes = [Note(name=model.name, text=f"stands for {what}{of}: no network was asked", source=SOURCE, figures=False)]
    if written.tokenizer:
        text = "stands in for the model's own: it has the model's vocabulary size, and other tokens"
        if not rows_replaced:
            text += "; the lengths of rows, and so the figures, are a guess (--longest-rows makes them known)"
        notes.append(Note(name=f"the tokenizer of {model.name}", text=text, source=SOURCE, figures=not rows_replaced))
    return notes


def _longest_length(command: Sequence[str]) -> int:
    """Return the largest length of a row that the program's flags or its configuration files name; 0 if none does."""
    texts = [" ".join(command)]
    for argument in command:
        path = Path(argument)
        if path.suffix in (".yml", ".yaml", ".json", ".toml") and path.is_file():
            texts.append(path.read_text(errors="replace"))
    found = [int(number.replace("_", "")) for text in texts for number in _LENGTH.findall(text)]
    return max(found, default=0)
