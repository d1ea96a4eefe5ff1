"""Reads and writes a run's settings as flat YAML. A setting has the same name there, in the flags and in messages."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import shlex
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from finetune.config.recompute import spelled
from finetune.config.settings import RunConfig
from finetune.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping


@functools.cache
def sections() -> dict[str, type[Any]]:
    """Return the sections of :class:`RunConfig` by name, in order: ``{"model": ModelConfig, ...}``."""
    return typing.get_type_hints(RunConfig)


@functools.cache
def field_types() -> dict[str, tuple[str, Any]]:
    """Return each setting's section and type: ``{"rank": ("adapter", int), ...}``. No name is in two sections."""
    return {
        name: (section, kind)
        for section, cls in sections().items()
        for name, kind in typing.get_type_hints(cls).items()
    }


def flatten(config: RunConfig) -> dict[str, Any]:
    """Return every setting by its name, without the sections: ``{"model": ..., "rank": 16, ...}``."""
    return {
        field.name: getattr(getattr(config, section), field.name)
        for section, cls in sections().items()
        for field in dataclasses.fields(cls)
    }


def json_values(config: RunConfig) -> dict[str, Any]:
    """Return every setting by its name, as JSON can hold it: lists in place of tuples, text in place of paths."""
    return {name: _plain(value) for name, value in flatten(config).items()}


def flag(name: str) -> str:
    """Return a setting's flag: ``--micro-batch`` for ``micro_batch``."""
    return "--" + name.replace("_", "-")


def as_flags(settings: Mapping[str, Any]) -> str:
    """Return settings as flags of a command line, quoted for a shell."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(flag(name) if value else f"--no-{flag(name)[2:]}")
        else:
            values = value if isinstance(value, (tuple, list)) else (str(value),)
            words.append(" ".join([flag(name), *map(shlex.quote, values)]))
    return " ".join(words)


def replace(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """Return a copy of ``config`` in which the named settings have other values, whatever section they are in."""
    where = field_types()
    parts = {
        section: dataclasses.replace(
            getattr(config, section), **{name: value for name, value in settings.items() if where[name][0] == section}
        )
        for section in sections()
    }
    return RunConfig(**parts)


def dump(config: RunConfig) -> str:
    """Return YAML that :func:`load` turns into the same settings.

    The settings of :class:`~finetune.config.settings.DryRunConfig` are left out: they do not change what is trained.
    """
    lines = ["# python -m finetune.qlora THIS_FILE.yaml    (a flag after the file overrides the file)"]
    for section, cls in sections().items():
        if section == "dry":
            continue
        lines += ["", f"# {(cls.__doc__ or '').strip()}"]
        for field in dataclasses.fields(cls):
            lines.append(_line(field.name, getattr(getattr(config, section), field.name)))
    return "\n".join(lines) + "\n"


def load(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings, and check each value against the type of its field.

    Returns:
        The settings in the file, by field name; a setting that the file leaves out is not among them. A file with an
        accumulation and without a batch has a batch of None, which takes the place of a recorded one.

    Raises:
        ConfigError: the file cannot be read, a key is unknown or given twice, a value has the wrong type, or settings
            of the split contradict each other.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(
            _file_problem(path, error.strerror or str(error), "name a YAML file that can be read")
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(_file_problem(path, f"not YAML: {error}", _ONE_A_LINE)) from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        why = f"the file holds a {type(document).__name__}, not settings"
        raise ConfigError(_file_problem(path, why, _ONE_A_LINE))
    types_of, settings = field_types(), {}
    document, problems = _with_split(document)
    if "checkpointing" in document:
        document = document | {"checkpointing": spelled(document["checkpointing"])}
    for key, value in document.items():
        if isinstance(value, dict) and key in sections():
            remedy = "write them at the top level, such as " + ", ".join(
                f"`{k}: {v}`" for k, v in list(value.items())[:2]
            )
            problems.append(Problem(field=str(key), value=value, why="settings are not nested", remedy=remedy))
        elif key not in types_of:
            problems.append(unknown_setting(str(key), value))
        else:
            try:
                settings[key] = _typed(value, types_of[key][1])
            except TypeError as error:
                problems.append(Problem(field=key, value=value, why=f"in {path}, not {error}", remedy=_example(key)))
    if problems:
        raise ConfigError(*problems)
    return settings


def _with_split(document: dict[Any, Any]) -> tuple[dict[Any, Any], list[Problem]]:
    """Return a file's settings with what those of the split imply, as flags do, and which of them contradict others."""
    problems = []
    rows, accumulation, given = (document.get(name) for name in ("batch", "accumulation", "micro_batch"))
    automatic = given == "auto"
    size = 1 if automatic or given is None else given
    numbers = all(type(number) is int for number in (rows, accumulation, size))  # others are refused by their type
    if numbers and rows != accumulation * size:  # type: ignore[operator]  # `numbers` says that they are int
        why = f"accumulation = {accumulation} is given too, and follows from it"
        problems.append(Problem(field="batch", value=rows, why=why, remedy="give one of the two"))
    if automatic and document.get("split") == "given":
        why = "split = given is given too"
        problems.append(Problem(field="micro_batch", value="auto", why=why, remedy="give one of the two"))
    if "accumulation" in document:
        document = {"batch": None} | document
    if "micro_batch" in document:  # a number takes the choice from the run
        document = {"split": "auto" if automatic else "given"} | document
        if automatic:
            del document["micro_batch"]
    return document, problems


def unknown_setting(key: str, value: object) -> Problem:
    """Return the problem for a name that no setting has; its remedy lists settings with a similar name."""
    near = difflib.get_close_matches(key.replace("-", "_").lower(), field_types(), n=3, cutoff=0.6)
    remedy = "did you mean " + " or ".join(near) + "?" if near else "--print-config prints every setting"
    return Problem(field=key, value=value, why="no such setting", remedy=remedy)


class _Loader(yaml.SafeLoader):
    """Reads scalars by the rules of YAML 1.2 (``no`` is text, ``2e-4`` a number), and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that :class:`_Loader` would otherwise read back as a number or a boolean."""


_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$")
_KEPT = {tag: f"tag:yaml.org,2002:{tag}" for tag in ("bool", "float", "int", "null", "merge")}
_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
for _first, _pairs in yaml.SafeLoader.yaml_implicit_resolvers.items():
    _resolvers[_first] = [pair for pair in _pairs if pair[0] in (_KEPT["null"], _KEPT["merge"])]
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {first: list(pairs) for first, pairs in _resolvers.items()}
    _class.add_implicit_resolver(_KEPT["bool"], _BOOL, list("tTfF"))
    _class.add_implicit_resolver(_KEPT["float"], _FLOAT, list("-+.0123456789"))
    _class.add_implicit_resolver(_KEPT["int"], re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _typed(value: Any, kind: Any) -> Any:
    """Return ``value`` converted to the type ``kind``.

    Raises:
        TypeError: the value has another type; the message names, in words, the values that the setting takes.
    """
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _typed_as_one_of(value, typing.get_args(kind))
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            raise TypeError(f"one of {', '.join(choices)}" + (f" (did you mean {near[0]}?)" if near else ""))
        return value
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise TypeError("a list of names")
        return tuple(items)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not kind:
        raise TypeError(_IN_WORDS[kind])
    return value


def _typed_as_one_of(value: Any, kinds: tuple[Any, ...]) -> Any:
    if type(value) in kinds:
        return value
    others = [kind for kind in kinds if kind is not type(None)]
    whys = []
    for kind in others:
        try:
            return _typed(value, kind)
        except TypeError as error:
            whys.append(str(error))
    raise TypeError(" or ".join(whys))


_ONE_A_LINE = "write one `name: value` on each line"
_IN_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text (put it in quotes)",
    Path: "a path",
}


def _line(name: str, value: Any) -> str:
    text = yaml.dump(_plain(value), Dumper=_Dumper, default_flow_style=True, width=10_000, allow_unicode=True)
    return f"{name}: {text.removesuffix('...' + chr(10)).rstrip()}"


def _example(name: str) -> str:
    return f"write it such as `{_line(name, flatten(RunConfig())[name])}`"


def _file_problem(path: Path, why: str, remedy: str) -> Problem:
    return Problem(field="CONFIG", value=str(path), why=why, remedy=remedy)
