"""Convert frozen dataclasses to plain JSON values and back, by their type hints."""

from __future__ import annotations

import dataclasses
import types
import typing
from functools import cache
from typing import Any, TypeVar

from pytest_vram.errors import VramUsageError
from pytest_vram.memory.verdict import Exceeded, Unmeasured, Within

T = TypeVar("T")

_TAG = "verdict"
_TAGGED = {"within": Within, "exceeded": Exceeded, "unmeasured": Unmeasured}
_NAMES = {cls: name for name, cls in _TAGGED.items()}


def encode(value: Any) -> Any:
    """Convert a value to dicts, lists, text, numbers, booleans and ``None``.

    Fields that have their default value are left out. A verdict gets the key ``verdict``, which names its kind.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tag = {_TAG: _NAMES[type(value)]} if type(value) in _NAMES else {}
        return tag | {
            field.name: encode(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if _required(field) or getattr(value, field.name) != field.default
        }
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    return value


def decode(cls: type[T], data: Any) -> T:
    """Make a ``cls`` from the data that :func:`encode` or ``dataclasses.asdict`` made.

    Unknown fields are ignored. Only ``encode`` names the kind of a verdict, so a verdict must come from it.

    Raises:
        VramUsageError: the data do not describe a ``cls``; the message names the field.
    """
    result: T = _decode(cls, data, cls.__name__)
    return result


def _decode(hint: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(arguments, data, where)
    if origin is typing.Literal:
        return _checked(data in arguments, data, where, f"one of {arguments}")
    if origin is tuple:
        _checked(isinstance(data, (list, tuple)), data, where, "a list")
        hints = [arguments[0]] * len(data) if arguments[-1] is Ellipsis else arguments
        return tuple(_decode(h, part, f"{where}[{i}]") for i, (h, part) in enumerate(zip(hints, data, strict=True)))
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, data, where)
    if hint is float:
        return float(_checked(isinstance(data, (int, float)) and not isinstance(data, bool), data, where, "a number"))
    if hint in (int, str, bool):
        sound = isinstance(data, hint) and (hint is bool or not isinstance(data, bool))
        return _checked(sound, data, where, hint.__name__)
    return data


def _decode_union(arguments: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in arguments:
        return None
    kinds = [a for a in arguments if a is not type(None)]
    if len(kinds) == 1:
        return _decode(kinds[0], data, where)
    _checked(isinstance(data, dict) and data.get(_TAG) in _TAGGED, data, where, f"a verdict: {', '.join(_TAGGED)}")
    return _decode(_TAGGED[data[_TAG]], data, where)


def _decode_dataclass(cls: Any, data: Any, where: str) -> Any:
    _checked(isinstance(data, dict), data, where, "an object")
    values = {}
    for field in dataclasses.fields(cls):
        if field.name in data:
            values[field.name] = _decode(_hints(cls)[field.name], data[field.name], f"{where}.{field.name}")
        elif _required(field):
            raise VramUsageError(f"{where} has no {field.name!r}")
    return cls(**values)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _checked(sound: bool, data: Any, where: str, wanted: str) -> Any:
    if not sound:
        raise VramUsageError(f"{where} is {data!r}, which is not {wanted}")
    return data
